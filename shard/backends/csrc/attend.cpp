#include "attend.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "crew.h"
#include "tensors.h"

namespace tessera {
namespace {

// Multiplications that take about as long as waking a second thread (tens of microseconds).
constexpr int64_t WORK_PER_THREAD = 1 << 20;

// Keys that some row of the tile sees.
struct KeyRange {
  int64_t first, last;

  int64_t first_segment() const { return first / SEGMENT; }
  int64_t num_segments() const { return (last + SEGMENT - 1) / SEGMENT - first_segment(); }
};

struct PlannedTile {
  AttendTile tile;
  KeyRange keys;
  int64_t partials = -1;  // where in the workspace its segments' results go; -1: in one piece
};

// A tile, or one segment of it.
struct Task {
  int64_t tile;
  int64_t segment;  // -1: all
  int64_t work;     // rows * keys
};

struct AlignedDelete {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};
using Workspace = std::unique_ptr<float[], AlignedDelete>;

Workspace allocate(int64_t floats) {
  return Workspace(static_cast<float*>(
      ::operator new[](static_cast<size_t>(floats) * sizeof(float), std::align_val_t{64})));
}

template <typename T>
class Plan {
 public:
  Plan(const Kernels& kernels, const AttendArgs<T>& args, const StepShape& step)
      : kernels(kernels), functions(typed(kernels, T{})), args(args) {
    for (int64_t s = 0; s < step.num_sequences; s++) plan_sequence(step, s);
    threads = std::clamp<int64_t>(work * args.head_size / WORK_PER_THREAD, 1,
                                  crew_size());
    divide();
  }

  void run() {
    int64_t partial_floats = Partial::floats(max_rows, args.head_size);
    int64_t own_floats = 2 * partial_floats + padded(kernels.scratch_floats(max_rows,
                                                                            args.head_size));
    Workspace own = allocate(threads * own_floats), shared = allocate(shared_floats);
    std::vector<std::atomic<int64_t>> left(tiles.size());
    for (size_t i = 0; i < tiles.size(); i++) left[i] = tiles[i].keys.num_segments();
    share_out(threads, tasks.size(), 1, [&](int64_t member, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        run_task(tasks[i], own.get() + member * own_floats, partial_floats, shared.get(),
                 left[tasks[i].tile]);
      }
    });
  }

 private:
  const Kernels& kernels;
  const TypedKernels<T>& functions;
  const AttendArgs<T>& args;
  std::vector<PlannedTile> tiles;
  std::vector<Task> tasks;
  int64_t work = 0;
  int64_t threads = 1;
  int64_t max_rows = 1;
  int64_t shared_floats = 1;

  void plan_sequence(const StepShape& step, int64_t s) {
    int64_t first_token = step.query_start[s];
    int64_t num_tokens = step.query_start[s + 1] - first_token;
    int64_t first_position = step.context_lens[s] - num_tokens;
    for (int64_t row = 0; row < num_tokens * args.group; row += MAX_ROWS) {
      int64_t last_row = std::min(row + MAX_ROWS, num_tokens * args.group);
      int64_t lowest = first_position + row / args.group;
      KeyRange keys{args.window ? std::max<int64_t>(0, lowest - args.window + 1) : 0,
                    args.causal ? first_position + (last_row - 1) / args.group + 1
                                : step.context_lens[s]};
      for (int64_t head = 0; head < args.num_kv_heads; head++) {
        tiles.push_back({{s, head, first_token, first_position, row, last_row}, keys});
        work += (last_row - row) * (keys.last - keys.first);
      }
      max_rows = std::max(max_rows, last_row - row);
    }
  }

  // Tiles that would keep one thread busy while the others wait are cut into their segments.
  void divide() {
    int64_t piece = work / (threads * PIECES_PER_THREAD);
    for (size_t i = 0; i < tiles.size(); i++) {
      PlannedTile& planned = tiles[i];
      int64_t rows = planned.tile.rows(), segments = planned.keys.num_segments();
      int64_t tile_work = rows * (planned.keys.last - planned.keys.first);
      bool cut = threads > 1 && segments > 1 && tile_work > piece;
      if (cut) {
        planned.partials = shared_floats;
        shared_floats += segments * Partial::floats(rows, args.head_size);
      }
      for (int64_t part = 0; part < (cut ? segments : 1); part++) {
        tasks.push_back({static_cast<int64_t>(i), cut ? part : -1,
                         cut ? tile_work / segments : tile_work});
      }
    }
    if (threads > 1) {
      std::stable_sort(tasks.begin(), tasks.end(),
                       [](const Task& a, const Task& b) { return a.work > b.work; });
    }
  }

  void run_task(const Task& task, float* memory, int64_t partial_floats, float* shared,
                std::atomic<int64_t>& left) {
    const PlannedTile& planned = tiles[task.tile];
    int64_t rows = planned.tile.rows();
    Partial total = Partial::at(memory, rows, args.head_size);
    Partial part = Partial::at(memory + partial_floats, rows, args.head_size);
    float* scratch = memory + 2 * partial_floats;
    int64_t segments = planned.keys.num_segments();
    if (task.segment < 0) {
      for (int64_t i = 0; i < segments; i++) {
        attend_segment(planned, i, i ? part : total, scratch);
        if (i) kernels.merge(total, part, rows, args.head_size);
      }
    } else {
      attend_segment(planned, task.segment, partial(planned, task.segment, shared), scratch);
      if (left.fetch_sub(1) > 1) return;  // the last one to finish adds up, in order
      total = partial(planned, 0, shared);
      for (int64_t i = 1; i < segments; i++) {
        kernels.merge(total, partial(planned, i, shared), rows, args.head_size);
      }
    }
    functions.finish(args, planned.tile, total);
  }

  Partial partial(const PlannedTile& planned, int64_t segment, float* shared) const {
    int64_t rows = planned.tile.rows();
    int64_t at = planned.partials + segment * Partial::floats(rows, args.head_size);
    return Partial::at(shared + at, rows, args.head_size);
  }

  void attend_segment(const PlannedTile& planned, int64_t index, const Partial& to,
                      float* scratch) const {
    int64_t start = (planned.keys.first_segment() + index) * SEGMENT;
    functions.attend_segment(args, planned.tile, std::max(start, planned.keys.first),
                             std::min(start + SEGMENT, planned.keys.last), to, scratch);
  }
};

}  // namespace

template <typename T>
void attend(const Kernels& kernels, const AttendArgs<T>& args, const StepShape& step) {
  Plan<T>(kernels, args, step).run();
}

template void attend(const Kernels&, const AttendArgs<float>&, const StepShape&);
template void attend(const Kernels&, const AttendArgs<bf16>&, const StepShape&);

}  // namespace tessera
