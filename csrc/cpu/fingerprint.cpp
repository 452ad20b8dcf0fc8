// A fingerprint of memory at about the speed at which it can be read.
//
// Every 32-bit word goes into one of many running states, state = rotate(state ^ word, 7) + c. That
// is one-to-one in the state and in the word, and so is all that follows: a change of one word, or
// of words of one state of which the last differs in effect, always changes the result. Other
// changes go unnoticed once in 2^32 times or more rarely. Plain sums would miss changes of the same
// bit in many words, such as the signs of a whole matrix.
//
// The value depends on the instruction set, so it is for comparison within one process only.
#include "fingerprint.h"

#include <cstring>

#include "vector.h"

namespace ember {
inline namespace EMBER_ISA {
namespace {

using Words = Vector<uint32_t>;

constexpr int states = 8;
constexpr int64_t group_bytes = int64_t(1) << 21;

EMBER_HD Words mixed(Words state, Words word) {
  state ^= word;
  return (state << 7 | state >> 25) + 0x9E3779B9u;
}

EMBER_HD uint64_t mixed(uint64_t state, uint64_t value) {
  state = (state ^ value) * 0x9E3779B97F4A7C15u;
  return state ^ state >> 32;
}

// The states of one group of pieces.
class Group {
 public:
  void add(const void* data, int64_t bytes) {
    constexpr int64_t size = vector_bytes;
    const char* from = static_cast<const char*>(data);
    length_ = mixed(length_, uint64_t(bytes));
    for (; bytes >= states * size; bytes -= states * size, from += states * size) {
#pragma GCC unroll 8
      for (int i = 0; i < states; ++i) state_[i] = mixed(state_[i], load(from + i * size));
    }
    int i = 0;
    for (; bytes >= size; bytes -= size, from += size, ++i) {
      state_[i] = mixed(state_[i], load(from));
    }
    if (bytes > 0) {
      alignas(64) char rest[size] = {};
      std::memcpy(rest, from, size_t(bytes));
      state_[i] = mixed(state_[i], load(rest));
    }
  }

  uint64_t result() const {
    Words all{};
    for (int i = 0; i < states; ++i) all = mixed(all, state_[i]);
    uint64_t result = length_;
    for (int lane = 0; lane < lanes<uint32_t>; ++lane) result = mixed(result, all[lane]);
    return result;
  }

 private:
  static Words load(const char* from) {
    return load_vector(reinterpret_cast<const uint32_t*>(from));
  }

  Words state_[states] = {};
  uint64_t length_ = 0;
};

// The part of all pieces, laid end to end, that lies in [begin, end) of their bytes.
uint64_t fingerprint_of(const FingerprintParams& p, int64_t begin, int64_t end) {
  Group group;
  int64_t at = 0;
  for (int64_t i = 0; i < p.count && at < end; ++i) {
    const int64_t bytes = p.pieces[i].bytes;
    const int64_t from = begin > at ? begin - at : 0, to = end - at < bytes ? end - at : bytes;
    if (from < to) group.add(static_cast<const char*>(p.pieces[i].data) + from, to - from);
    at += bytes;
  }
  return group.result();
}

}  // namespace

void fingerprint(const FingerprintParams& p, const ThreadPool& pool) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < p.count; ++i) bytes += p.pieces[i].bytes;
  if (bytes <= group_bytes) {
    *p.result = fingerprint_of(p, 0, bytes);
    return;
  }
  // Groups of a fixed size, whatever the number of threads.
  constexpr int64_t most = 256;
  uint64_t results[most];
  int64_t groups = (bytes + group_bytes - 1) / group_bytes;
  if (groups > most) groups = most;
  const int64_t size = (bytes + groups - 1) / groups;
  parallel_for(pool, groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t end = (i + 1) * size;
      results[i] = fingerprint_of(p, i * size, end < bytes ? end : bytes);
    }
  });
  uint64_t result = uint64_t(bytes);
  for (int64_t i = 0; i < groups; ++i) result = mixed(result, results[i]);
  *p.result = result;
}

}  // namespace EMBER_ISA
}  // namespace ember
