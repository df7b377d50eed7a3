// Threads that share out the pieces of one operation.
//
// OpenMP's threads all have to come before an operation starts and before it ends: where a neighbour
// takes a processor for a millisecond, every operation of a step waits for it. Here whoever is awake
// takes the next piece, and the caller waits for nothing but pieces that somebody has begun.
#pragma once

#include <cstdint>

namespace tessera {

// Threads that torch is set to use, the caller's among them.
int64_t crew_size();

using Piece = void (*)(const void* body, int64_t member, int64_t begin, int64_t end);
void share_out_pieces(int64_t members, int64_t count, int64_t piece, Piece call, const void* body);

// Calls body(member, begin, end) for ranges of up to `piece` that make up [0, count), on up to
// `members` threads. `member` tells those apart that run at the same time; the caller's is 0.
template <typename Body>
void share_out(int64_t members, int64_t count, int64_t piece, const Body& body) {
  const Piece call = [](const void* body, int64_t member, int64_t begin, int64_t end) {
    (*static_cast<const Body*>(body))(member, begin, end);
  };
  share_out_pieces(members, count, piece, call, &body);
}

}  // namespace tessera
