// How a warp reads and writes a row: in tiles of 256 columns, eight columns a lane, 16 bytes an access.
//
// Where every tensor of a call is 16 bits wide ("direct"), lane l has columns 8l..8l+7 of a tile: one access of 16
// bytes. Where one is float32 ("split"), it has 4l..4l+3 and 128+4l..128+4l+3, so that a warp's float4 accesses stay
// whole cache lines; two neighbours then share two Philox calls and swap half of each. Either way it is one call for
// eight elements. Which it is depends on dtypes alone, so strides change no bit of a result.
//
// A dtype is a template argument where all is known and aligned, kAny where it is looked up at run time: there a tensor
// that is not 16-byte aligned, or has no unit stride, or a width not divisible by 8, goes element by element.
#pragma once
#include "common/philox.h"
#include "common/rounding.h"
#include "cuda/launch.cuh"

namespace fastlm {
namespace cuda {

constexpr int kAny = -1;
constexpr int kTile = 256;

struct Rows {
  int64_t count, n1, n2;  // n1, n2: the two inner of the three leading axes
  int32_t columns;
  bool flat;  // only the innermost one is longer than 1
};

struct RowTensor {
  char* data;
  int64_t stride[4];  // in bytes, the last one between columns
  int32_t dtype;
  bool vector;  // 16-byte accesses are allowed
};

struct ColumnVector {
  const char* data;
  int64_t stride;  // in bytes
  int32_t dtype;
  bool vector;
};

struct Index {
  int64_t i0, i1, i2;
};

// A lane's eight columns: low..low+3 and high..high+3.
struct LaneColumns {
  int low, high, tile;
};

// Eight values as they lie in memory: eight words of float32, or four words of pairs.
struct Raw {
  uint32_t w[8];
};

FASTLM_DEVICE Index index_of(const Rows& rows, int64_t row) {
  if (rows.flat) return {0, 0, row};
  if (rows.count <= 0xFFFFFFFFll) {
    const uint32_t r = static_cast<uint32_t>(row), n1 = static_cast<uint32_t>(rows.n1),
                   n2 = static_cast<uint32_t>(rows.n2);
    return {r / n2 / n1, r / n2 % n1, r % n2};
  }
  return {row / rows.n2 / rows.n1, row / rows.n2 % rows.n1, row % rows.n2};
}

FASTLM_DEVICE char* row_of(const RowTensor& t, const Index& i) {
  return t.data + i.i0 * t.stride[0] + i.i1 * t.stride[1] + i.i2 * t.stride[2];
}

FASTLM_DEVICE LaneColumns lane_columns(int tile, int lane, bool split) {
  const int base = tile * kTile;
  return split ? LaneColumns{base + 4 * lane, base + 128 + 4 * lane, tile}
               : LaneColumns{base + 8 * lane, base + 8 * lane + 4, tile};
}

FASTLM_DEVICE int column_of(const LaneColumns& at, int e) { return (e < 4 ? at.low : at.high) + (e & 3); }

template <class Value>
FASTLM_DEVICE Value load(const char* at) {
  return *reinterpret_cast<const Value*>(at);
}

template <class Value>
FASTLM_DEVICE void store(char* at, Value value) {
  *reinterpret_cast<Value*>(at) = value;
}

FASTLM_DEVICE float load_scalar(const char* at, int dtype) {
  if (dtype == kFloat32) return load<float>(at);
  const uint32_t bits = load<uint16_t>(at);
  return dtype == kBFloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
}

FASTLM_DEVICE void store_scalar(char* at, int dtype, float value) {
  if (dtype == kFloat32) {
    store<float>(at, value);
  } else {
    const uint32_t pair = dtype == kBFloat16 ? bfloat16_pair(value, 0.0f) : float16_pair(value, 0.0f);
    store<uint16_t>(at, static_cast<uint16_t>(pair & 0xFFFFu));
  }
}

// Eight values of the row at `row`; zeros beyond the last column.
template <int D>
FASTLM_DEVICE Raw fetch(const RowTensor& t, const char* row, const LaneColumns& at, bool split, int columns) {
  Raw raw = {};
  const int dtype = D == kAny ? t.dtype : D;
  if (D == kAny && !t.vector) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int column = column_of(at, e);
      if (column >= columns) continue;
      const char* element = row + column * t.stride[3];
      if (dtype == kFloat32) {
        raw.w[e] = load<uint32_t>(element);
      } else {
        raw.w[e >> 1] |= static_cast<uint32_t>(load<uint16_t>(element)) << (16 * (e & 1));
      }
    }
  } else if (dtype == kFloat32) {
    if (at.low < columns) {
      const uint4 v = load<uint4>(row + 4ll * at.low);
      raw.w[0] = v.x, raw.w[1] = v.y, raw.w[2] = v.z, raw.w[3] = v.w;
    }
    if (at.high < columns) {
      const uint4 v = load<uint4>(row + 4ll * at.high);
      raw.w[4] = v.x, raw.w[5] = v.y, raw.w[6] = v.z, raw.w[7] = v.w;
    }
  } else if (split) {
    if (at.low < columns) {
      const uint2 v = load<uint2>(row + 2ll * at.low);
      raw.w[0] = v.x, raw.w[1] = v.y;
    }
    if (at.high < columns) {
      const uint2 v = load<uint2>(row + 2ll * at.high);
      raw.w[2] = v.x, raw.w[3] = v.y;
    }
  } else if (at.low < columns) {
    const uint4 v = load<uint4>(row + 2ll * at.low);
    raw.w[0] = v.x, raw.w[1] = v.y, raw.w[2] = v.z, raw.w[3] = v.w;
  }
  return raw;
}

template <int D>
FASTLM_DEVICE void decode(int runtime_dtype, const Raw& raw, float (&out)[8]) {
  const int dtype = D == kAny ? runtime_dtype : D;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (dtype == kFloat32) {
      out[e] = float_of_bits(raw.w[e]);
    } else if (dtype == kBFloat16) {
      const uint32_t word = raw.w[e >> 1];
      out[e] = float_of_bits(e & 1 ? word & 0xFFFF0000u : word << 16);
    } else {
      out[e] = float16_to_float((raw.w[e >> 1] >> (16 * (e & 1))) & 0xFFFFu);
    }
  }
}

template <int D>
FASTLM_DEVICE Raw encode(int runtime_dtype, const float (&in)[8]) {
  const int dtype = D == kAny ? runtime_dtype : D;
  Raw raw = {};
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (dtype == kFloat32) {
      raw.w[e] = bits_of_float(in[e]);
    } else if ((e & 1) == 0) {
      raw.w[e >> 1] = dtype == kBFloat16 ? bfloat16_pair(in[e], in[e + 1]) : float16_pair(in[e], in[e + 1]);
    }
  }
  return raw;
}

template <int D>
FASTLM_DEVICE void put(const RowTensor& t, char* row, const LaneColumns& at, bool split, int columns, const Raw& raw) {
  const int dtype = D == kAny ? t.dtype : D;
  if (D == kAny && !t.vector) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int column = column_of(at, e);
      if (column >= columns) continue;
      char* element = row + column * t.stride[3];
      if (dtype == kFloat32) {
        store<uint32_t>(element, raw.w[e]);
      } else {
        store<uint16_t>(element, static_cast<uint16_t>((raw.w[e >> 1] >> (16 * (e & 1))) & 0xFFFFu));
      }
    }
  } else if (dtype == kFloat32) {
    if (at.low < columns) store(row + 4ll * at.low, uint4{raw.w[0], raw.w[1], raw.w[2], raw.w[3]});
    if (at.high < columns) store(row + 4ll * at.high, uint4{raw.w[4], raw.w[5], raw.w[6], raw.w[7]});
  } else if (split) {
    if (at.low < columns) store(row + 2ll * at.low, uint2{raw.w[0], raw.w[1]});
    if (at.high < columns) store(row + 2ll * at.high, uint2{raw.w[2], raw.w[3]});
  } else if (at.low < columns) {
    store(row + 2ll * at.low, uint4{raw.w[0], raw.w[1], raw.w[2], raw.w[3]});
  }
}

// Eight parameters, their dtype looked up at run time whatever D is: they come from the L1 or L2 cache. Zeros beyond
// the last column. D is kAny where they may be unaligned.
template <int D>
FASTLM_DEVICE void parameters(const ColumnVector& v, const LaneColumns& at, int columns, float (&out)[8]) {
  const bool vector = D != kAny || v.vector;
  if (vector && v.dtype == kFloat32) {
    uint4 low = {}, high = {};
    if (at.low < columns) low = load<uint4>(v.data + 4ll * at.low);
    if (at.high < columns) high = load<uint4>(v.data + 4ll * at.high);
    decode<kFloat32>(kFloat32, Raw{{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}}, out);
  } else if (vector) {
    uint2 low = {}, high = {};
    if (at.low < columns) low = load<uint2>(v.data + 2ll * at.low);
    if (at.high < columns) high = load<uint2>(v.data + 2ll * at.high);
    decode<kAny>(v.dtype, Raw{{low.x, low.y, high.x, high.y}}, out);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int column = column_of(at, e);
      out[e] = column < columns ? load_scalar(v.data + column * v.stride, v.dtype) : 0.0f;
    }
  }
}

// scale[e] = kept ? scale[e] : 0 for a lane's eight columns of a tile. All lanes of the warp must call.
FASTLM_DEVICE void drop(float (&scale)[8], const LaneColumns& at, int lane, bool split, uint32_t row_low,
                        uint32_t row_high, uint32_t key0, uint32_t key1, uint32_t threshold) {
  const int odd = lane & 1;
  const uint32_t chunk = static_cast<uint32_t>(at.tile) * (kTile / 8) + (split ? (lane >> 1) + 16 * odd : lane);
  philox::Words words = philox::philox4x32({{chunk, row_low, row_high, 0u}}, key0, key1);
  if (split) {  // I drew one chunk for my neighbour and me, it drew the other: each of us has one half of both
    const uint32_t got0 = __shfl_xor_sync(0xFFFFFFFFu, odd ? words.w[0] : words.w[2], 1);
    const uint32_t got1 = __shfl_xor_sync(0xFFFFFFFFu, odd ? words.w[1] : words.w[3], 1);
    if (odd) {
      words.w[0] = got0, words.w[1] = got1;
    } else {
      words.w[2] = got0, words.w[3] = got1;
    }
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (philox::bits_of(words, e) < threshold) scale[e] = 0.0f;
  }
}

// --- host: from the border's tensors ---
inline int64_t bytes_of(int64_t dtype) { return dtype == kFloat32 ? 4 : 2; }

inline bool is_float(int64_t dtype) { return dtype == kFloat32 || dtype == kBFloat16 || dtype == kFloat16; }

inline Rows make_rows(const Sizes& sizes, const char* op) {
  if (sizes[0] < 0 || sizes[1] < 0 || sizes[2] < 0 || sizes[3] < 1 || sizes[3] > 0x7FFFFFFF - 65536) {
    throw std::invalid_argument(std::string("fastlm: ") + op +
                                ": the number of columns must be from 1 to 2**31 - 65537");
  }
  return {sizes[0] * sizes[1] * sizes[2], sizes[1], sizes[2], static_cast<int32_t>(sizes[3]),
          sizes[0] == 1 && sizes[1] == 1};
}

inline RowTensor make_row_tensor(const Tensor& t, const Sizes& sizes, const char* op, const char* name) {
  if (!is_float(t[1])) {
    throw std::invalid_argument(std::string("fastlm: ") + op + ": " + name + " must be float32, bfloat16 or float16");
  }
  const int64_t bytes = bytes_of(t[1]);
  RowTensor out = {reinterpret_cast<char*>(t[0]),
                   {t[2] * bytes, t[3] * bytes, t[4] * bytes, t[5] * bytes},
                   static_cast<int32_t>(t[1]),
                   false};
  out.vector = t[0] % 16 == 0 && t[5] == 1 && sizes[3] % 8 == 0;
  for (int axis = 0; axis < 3; ++axis) out.vector = out.vector && (sizes[axis] <= 1 || out.stride[axis] % 16 == 0);
  return out;
}

inline ColumnVector make_column_vector(const Tensor& t, const Sizes& sizes, const char* op, const char* name) {
  const RowTensor row = make_row_tensor(t, sizes, op, name);
  return {row.data, row.stride[3], row.dtype, t[0] % 16 == 0 && t[5] == 1 && sizes[3] % 8 == 0};
}

inline void need(const Tensor& t, const char* op, const char* name) {
  if (t[0] == 0) throw std::invalid_argument(std::string("fastlm: ") + op + ": " + name + " has no memory");
}

}  // namespace cuda
}  // namespace fastlm
