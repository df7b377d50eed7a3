// Waiting for something that comes within tens of microseconds, without giving the processor away.
#pragma once

namespace tessera {

constexpr int PAUSES = 2000;  // about 50 us; who waits longer lets others have the processor

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace tessera
