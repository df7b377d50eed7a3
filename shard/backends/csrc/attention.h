// Attention of one tile of query rows over the keys of one segment of a paged cache.
//
// Keys are taken KEYS at a time: multiplied with the queries, turned into weights of the softmax so
// far, multiplied with the values. A cache in pairs (kernels.h) lies as the matrix products want it;
// keys and values of others are packed for them first.
#pragma once

#include "float8.h"
#include "matmul.h"
#include "prefetch.h"

namespace tessera {
namespace {

constexpr int64_t KEYS = 64;
static_assert(SEGMENT % KEYS == 0 && KEYS % PAIRED_KEYS == 0);
const float ZEROS[MAX_HEAD_SIZE] = {};  // the value of a key that is not taken

// What T is multiplied as.
template <typename T>
struct CellOf {
  using Cell = FloatCell;
};
#if defined(__AVX512BF16__)
template <>
struct CellOf<bf16> {
  using Cell = PairCell;
};
#endif

// Up to LANES cells of a row, from cell `at` on.
template <typename T>
inline Floats load_cells(const T* row, int64_t at, int64_t count, FloatCell) {
  return Span{at, count}.load(row);
}

// Cells [at, at + LANES) of LANES rows: rows[key][cell] becomes cells[cell][key].
template <typename T, typename Cell>
inline void load_transposed(Floats (&cells)[LANES], const T* const (&rows)[LANES], int64_t at,
                            int64_t count, Cell cell) {
  for (int i = 0; i < LANES; i++) cells[i] = load_cells(rows[i], at, count, cell);
  transpose(cells);
}

// The cells of one product step, from the rows that it sums over.
template <typename T>
inline Floats zip_rows(const T* const (&rows)[1], Span span, FloatCell) {
  return span.load(rows[0]);
}

#if defined(__AVX512BF16__)
inline Floats load_cells(const bf16* row, int64_t at, int64_t count, PairCell) {
  if (count == LANES) return load_raw<Floats>(row + 2 * at);
  Floats some = {};
  std::memcpy(&some, row + 2 * at, count * sizeof(uint32_t));
  return some;
}

inline Floats zip_rows(const bf16* const (&rows)[2], Span span, PairCell) {
  Words even = bits<Words>(span.load(rows[0])) >> 16, odd = bits<Words>(span.load(rows[1]));
  return bits<Floats>(even | odd);
}
#endif

template <typename T>
int64_t token_of_row(const AttendArgs<T>& args, const AttendTile& tile, int64_t row) {
  return (tile.first_row + row) / args.group;
}

// Where a row of the tile lies in q_TNH and out_TNH.
template <typename T>
int64_t offset_of_row(const AttendArgs<T>& args, const AttendTile& tile, int64_t row) {
  int64_t head = tile.kv_head * args.group + (tile.first_row + row) % args.group;
  int64_t token = tile.first_token + token_of_row(args, tile, row);
  return (token * args.num_kv_heads * args.group + head) * args.head_size;
}

template <typename T>
class TileAttention {
  using Cell = typename CellOf<T>::Cell;
  using Type = typename Cell::Type;
  static constexpr int64_t VALUES = Cell::VALUES;
  static_assert(sizeof(Type) == sizeof(float));
  static_assert(VALUES == 1 || LANES == PAIRED_KEYS);

 public:
  TileAttention(const AttendArgs<T>& args, const AttendTile& tile, const Partial& to, float* scratch)
      : args(args), tile(tile), to(to), depth(args.head_size / VALUES),
        width(padded(args.head_size)),
        element_bytes(in_8_bits(args.storage) ? 1 : sizeof(T)) {
    q = reinterpret_cast<Type*>(scratch);  // [rows, depth]
    k = q + padded(tile.rows() * depth);   // [depth, KEYS]
    v = k + depth * KEYS;                  // [KEYS / VALUES, width]
    p = v + KEYS / VALUES * width;         // [rows, KEYS / VALUES]
    scores = reinterpret_cast<float*>(p + tile.rows() * KEYS / VALUES);  // [rows, KEYS]
    widened = reinterpret_cast<T*>(scores + tile.rows() * KEYS);         // [LANES, head size]
  }

  static int64_t scratch_floats(int64_t rows, int64_t head_size) {
    return padded(rows * head_size) + KEYS * (head_size + padded(head_size)) + 2 * rows * KEYS +
           LANES * head_size;
  }

  void attend(int64_t first_key, int64_t last_key) {
    clear();
    pack_queries();
    const int64_t begin = first_key / KEYS * KEYS;
    for (int64_t start = begin; start < last_key; start += KEYS) {
      origin = start;
      first = first_key > start ? first_key - start : 0;
      last = last_key - start < KEYS ? last_key - start : KEYS;
      // The task after this one is likely the next head's.
      const bool of_this_head = start + KEYS < last_key;
      next_head = tile.kv_head + (of_this_head ? 0 : 1);
      next_origin = of_this_head ? start + KEYS : begin;
      num_next = last_key - next_origin < KEYS ? last_key - next_origin : KEYS;
      if (next_head == args.num_kv_heads) num_next = 0;
      columns = (last + LANES - 1) / LANES * LANES;
      if constexpr (VALUES == 2) {
        if (args.storage == Storage::PAIRED) attend_paired();
        else attend_packed();
      } else {
        attend_packed();
      }
    }
  }

 private:
  const AttendArgs<T>& args;
  const AttendTile& tile;
  const Partial& to;
  int64_t depth;  // cells of a head
  int64_t width;  // padded head size
  Type *q, *k, *v, *p;
  float* scores;
  T* widened;  // keys or values of a cache in 8 bits, as they are needed
  int64_t element_bytes;  // of the cache
  int64_t origin = 0;           // position of the first of these KEYS
  int64_t first = 0, last = 0;  // those taken, counted from origin
  int64_t columns = 0;          // up to the last one taken, in whole vectors
  int64_t next_head = 0, next_origin = 0, num_next = 0;  // what is worked on after these
  int64_t offsets[KEYS], next_offsets[KEYS];

  template <typename B>
  Operands<Cell, B> scores_of(B keys) const {
    return {q, depth, keys, scores, KEYS, depth, false};
  }

  // From the weights of the cells [first_cell, last_cell), and their values.
  template <typename B>
  Operands<Cell, B> sums_of(B values, int64_t first_cell, int64_t last_cell) const {
    return {p + first_cell, KEYS / VALUES, values, to.sums, width, last_cell - first_cell, true};
  }

  void attend_packed() {
    locate(tile.kv_head, origin, last, 1, offsets);
    locate(next_head, next_origin, num_next, 1, next_offsets);
    Prefetcher ahead(args.k_BKPH, args.v_BKPH, next_offsets, num_next,
                     args.head_size * element_bytes);
    pack_keys(ahead);
    multiply(scores_of(Strided<Type>{k, KEYS}), tile.rows(), columns, ahead);
    for (int64_t row = 0; row < tile.rows(); row++) weigh(row);
    pack_values(ahead);
    multiply(sums_of(Strided<Type>{v, width}, 0, (last + VALUES - 1) / VALUES), tile.rows(), width,
             ahead);
  }

  void attend_paired() {
    locate(tile.kv_head, origin, last, PAIRED_KEYS, offsets);
    locate(next_head, next_origin, num_next, PAIRED_KEYS, next_offsets);
    Prefetcher ahead(args.k_BKPH, args.v_BKPH, next_offsets,
                     (num_next + PAIRED_KEYS - 1) / PAIRED_KEYS,
                     PAIRED_KEYS * args.head_size * element_bytes);
    const Type *keys[KEYS / LANES], *values[KEYS / VALUES];
    for (int64_t i = 0; i < columns / LANES; i++) keys[i] = cells_at(args.k_BKPH, i);
    multiply(scores_of(Columns<Type>{keys, LANES}), tile.rows(), columns, ahead);
    for (int64_t row = 0; row < tile.rows(); row++) weigh(row);
    const int64_t begin = first / VALUES, end = (last + VALUES - 1) / VALUES;
    for (int64_t i = begin; i < end; i++) {
      values[i] = cells_at(args.v_BKPH, i * VALUES / PAIRED_KEYS) +
                  i % (PAIRED_KEYS / VALUES) * args.head_size;
    }
    if (first % VALUES) values[begin] = one_of_two(values[begin], v, 0xffff0000u);
    if (last % VALUES) values[end - 1] = one_of_two(values[end - 1], v + width, 0x0000ffffu);
    multiply(sums_of(Scattered<Type>{values + begin}, begin, end), tile.rows(), width, ahead);
  }

  const Type* cells_at(const uint8_t* pool, int64_t part) const {
    return reinterpret_cast<const Type*>(pool + offsets[part]);
  }

  // A copy without the values of a key that is not taken, whatever its memory holds.
  const Type* one_of_two(const Type* pairs, Type* copy, Type mask) const {
    for (int64_t i = 0; i < args.head_size; i++) copy[i] = pairs[i] & mask;
    return copy;
  }

  // Where every `step`th key and value of a head from `origin` on lies in its pool, in bytes.
  void locate(int64_t kv_head, int64_t origin, int64_t count, int64_t step,
              int64_t (&offsets)[KEYS]) const {
    const int32_t* table = args.block_tables_SM + tile.sequence * args.table_stride;
    int64_t index = origin / args.block_size, in_block = origin % args.block_size;
    for (int64_t i = 0; i * step < count; i++) {
      offsets[i] = element_bytes * (table[index] * args.block_stride +
                                    kv_head * args.head_stride +
                                    in_block * args.position_stride);
      in_block += step;
      if (in_block == args.block_size) index++, in_block = 0;
    }
  }

  // A row of a pool; `slot` of the widened ones is overwritten.
  const T* row_at(const uint8_t* from, int slot) {
    if (!in_8_bits(args.storage)) return reinterpret_cast<const T*>(from);
    T* to = widened + slot * args.head_size;
    widen_row(from, args.storage, to, args.head_size);
    return to;
  }

  void clear() {
    for (int64_t i = 0; i < tile.rows() * width; i += LANES) store(to.sums + i, Floats{});
    for (int64_t i = 0; i < tile.rows() * PADDING; i += LANES) store(to.weights + i, Floats{});
    for (int64_t i = 0; i < tile.rows(); i++) to.max[i] = LOWEST;
  }

  void pack_queries() {
    for (int64_t row = 0; row < tile.rows(); row++) {
      const T* from = args.q_TNH + offset_of_row(args, tile, row);
      for_each_span(depth, [&](Span span) {
        Floats cells = load_cells(from, span.at, span.count, Cell{});
        std::memcpy(q + row * depth + span.at, &cells, span.count * sizeof(Type));
      });
    }
  }

  // k: cells down, keys across. Columns of keys that are not taken hold anything.
  void pack_keys(Prefetcher& ahead) {
    for (int64_t column = 0; column < columns; column += LANES) {
      const T* keys[LANES];
      for (int i = 0; i < LANES; i++) {
        int64_t key = column + i < first ? first : column + i < last ? column + i : last - 1;
        keys[i] = row_at(args.k_BKPH + offsets[key], i);
      }
      Type* to_column = k + column;
      for_each_span(depth, [&keys, &ahead, to_column](Span span) {
        ahead.fetch(8);
        Floats cells[LANES];
        load_transposed(cells, keys, span.at, span.count, Cell{});
        for (int i = 0; i < span.count; i++) {
          std::memcpy(to_column + (span.at + i) * KEYS, &cells[i], sizeof(Floats));
        }
      });
    }
  }

  // v: keys down, channels across; 0 for keys that are not taken, whatever their memory holds.
  void pack_values(Prefetcher& ahead) {
    for (int64_t key = 0; key < last; key += VALUES) {
      const T* rows[VALUES];
      for (int i = 0; i < VALUES; i++) {
        bool taken = first <= key + i && key + i < last;
        rows[i] = taken ? row_at(args.v_BKPH + offsets[key + i], i)
                        : reinterpret_cast<const T*>(ZEROS);
      }
      Type* to_row = v + key / VALUES * width;
      ahead.fetch(args.head_size * element_bytes * VALUES / (2 * LINE));
      for_each_span(args.head_size, [&rows, to_row](Span span) {
        Floats cells = zip_rows(rows, span, Cell{});
        std::memcpy(to_row + span.at, &cells, sizeof(cells));
      });
      for (int64_t at = (args.head_size + LANES - 1) / LANES * LANES; at < width; at++) {
        to_row[at] = 0;
      }
    }
  }

  // Scores of a row become weights in p; sums so far are scaled to the new maximum.
  void weigh(int64_t row) {
    int64_t position = tile.first_position + token_of_row(args, tile, row);
    int64_t after = position + 1 - origin;
    int64_t begin = args.window && after - args.window > first ? after - args.window : first;
    int64_t end = args.causal && after < last ? after : last;
    float* row_scores = scores + row * KEYS;
    Floats top = all(to.max[row]);
    for (int64_t at = 0; at < columns; at += LANES) {
      Floats x = load(row_scores + at) * args.scale;
      if (at < begin || at + LANES > end) x = hide(x, begin - at, end - at);
      store(row_scores + at, x);
      top = larger(top, x);
    }
    float new_max = max(top);
    if (new_max > to.max[row]) rescale(row, new_max);
    Floats weights = load(to.weights + row * PADDING);
    for (int64_t at = 0; at < columns; at += LANES) {
      Floats x = exp2(load(row_scores + at) - to.max[row]);
      weights += x;
      store_weights(p, row * KEYS + at, x);
    }
    store(to.weights + row * PADDING, weights);
  }

  static Floats hide(Floats x, int64_t begin, int64_t end) {
    Ints lanes = lane_numbers();
    Ints low = Ints{} + static_cast<int32_t>(begin < 0 ? 0 : begin > LANES ? LANES : begin);
    Ints high = Ints{} + static_cast<int32_t>(end < 0 ? 0 : end > LANES ? LANES : end);
    return (lanes >= low) & (lanes < high) ? x : all(-__builtin_inff());
  }

  static void store_weights(float* p, int64_t at, Floats x) { store(p + at, x); }
  static void store_weights(uint32_t* p, int64_t at, Floats x) {
    store(reinterpret_cast<bf16*>(p) + at, x);
  }

  void rescale(int64_t row, float new_max) {
    Floats factor = exp2(all(to.max[row] - new_max));
    to.max[row] = new_max;
    float* weights = to.weights + row * PADDING;
    store(weights, load(weights) * factor);
    for (int64_t at = 0; at < width; at += LANES) {
      float* sums = to.sums + row * width + at;
      store(sums, load(sums) * factor);
    }
  }
};

template <typename T>
void attend_segment(const AttendArgs<T>& args, const AttendTile& tile, int64_t first_key,
                    int64_t last_key, const Partial& to, float* scratch) {
  TileAttention<T>(args, tile, to, scratch).attend(first_key, last_key);
}

template <typename T>
void finish(const AttendArgs<T>& args, const AttendTile& tile, const Partial& from) {
  for (int64_t row = 0; row < tile.rows(); row++) {
    const float* sums = from.sums + row * padded(args.head_size);
    float total = sum(load(from.weights + row * PADDING));
    T* out = args.out_TNH + offset_of_row(args, tile, row);
    for_each_span(args.head_size, [&](Span span) { span.store(out, span.load(sums) / total); });
  }
}

int64_t scratch_floats(int64_t rows, int64_t head_size) {
  return TileAttention<float>::scratch_floats(rows, head_size);  // pairs take half as much
}

void merge(const Partial& to, const Partial& from, int64_t rows, int64_t head_size) {
  int64_t width = padded(head_size);
  for (int64_t row = 0; row < rows; row++) {
    float top = to.max[row] < from.max[row] ? from.max[row] : to.max[row];
    Floats keep = exp2(all(to.max[row] - top)), take = exp2(all(from.max[row] - top));
    auto add = [&](float* sum, const float* more) {
      store(sum, load(sum) * keep + load(more) * take);
    };
    to.max[row] = top;
    add(to.weights + row * PADDING, from.weights + row * PADDING);
    for (int64_t at = row * width; at < (row + 1) * width; at += LANES) {
      add(to.sums + at, from.sums + at);
    }
  }
}

}  // namespace
}  // namespace tessera
