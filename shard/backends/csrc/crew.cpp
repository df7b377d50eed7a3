#include "crew.h"

#include <ATen/Parallel.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <thread>

#include "pause.h"

namespace tessera {
namespace {

// One operation. `body` is the caller's, and alive as long as there are pieces.
struct Job {
  Job(int64_t count, int64_t piece, int64_t members, Piece call, const void* body)
      : count(count), piece(piece), members(members), call(call), body(body) {}

  const int64_t count, piece, members;
  const Piece call;
  const void* const body;
  std::atomic<int64_t> seats{1}, next{0}, done{0};

  // Pieces until there are none.
  void work(int64_t member) {
    for (int64_t begin; (begin = next.fetch_add(piece)) < count;) {
      const int64_t end = std::min(begin + piece, count);
      call(body, member, begin, end);
      done.fetch_add(end - begin, std::memory_order_release);
    }
  }

  void join() {
    const int64_t member = seats.fetch_add(1);
    if (member < members) work(member);
  }

  bool is_done() const { return done.load(std::memory_order_acquire) == count; }
};

// Its threads end with the process.
class Crew {
 public:
  void run(const std::shared_ptr<Job>& job) {
    {
      std::lock_guard<std::mutex> guard(mutex);
      for (; threads < job->members - 1; threads++) std::thread([this] { serve(); }).detach();
      latest = job;
    }
    number.fetch_add(1);
    number.notify_all();
    job->work(0);
    // Somebody is at the last pieces; if that thread has lost its processor, it may have this one.
    for (int i = 0; !job->is_done(); i++) i < PAUSES ? pause() : static_cast<void>(sched_yield());
  }

 private:
  std::mutex mutex;  // of `threads` and `latest`
  int64_t threads = 0;
  std::shared_ptr<Job> latest;
  std::atomic<uint32_t> number{0};  // of jobs so far

  void serve() {
    for (uint32_t seen = 0;;) {
      // The next operation of a step comes soon; between steps it sleeps.
      for (int i = 0; i < PAUSES && number.load() == seen; i++) pause();
      number.wait(seen);
      seen = number.load();
      std::shared_ptr<Job> job;
      {
        std::lock_guard<std::mutex> guard(mutex);
        job = latest;
      }
      if (job) job->join();
    }
  }
};

}  // namespace

int64_t crew_size() { return std::max<int64_t>(1, at::get_num_threads()); }

void share_out_pieces(int64_t members, int64_t count, int64_t piece, Piece call, const void* body) {
  members = std::min(members, (count + piece - 1) / piece);
  if (members <= 1) {
    if (count > 0) call(body, 0, 0, count);
    return;
  }
  static Crew& crew = *new Crew;
  crew.run(std::make_shared<Job>(count, piece, members, call, body));
}

}  // namespace tessera
