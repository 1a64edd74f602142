// AdamW on states of 5 bytes a parameter: see compact_adam.py, which compiles this and says what the numbers mean.
// All arithmetic is fp32, in the order of torch's AdamW, without contraction; so it gives the same bits on any machine.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t BLOCK = 256;       // moments that share a window of exponents
constexpr int SHIFT = 20;            // low bits of an fp32 that a moment's code leaves out
constexpr uint32_t MAGNITUDE = 0x7fffffff;

float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

uint64_t mix(uint64_t x) {  // SplitMix64 (Steele, Lea, Flood 2014)
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

uint32_t mix(uint32_t x) {  // the finaliser of MurmurHash3
    x = (x ^ (x >> 16)) * 0x85ebca6b;
    x = (x ^ (x >> 13)) * 0xc2b2ae35;
    return x ^ (x >> 16);
}

float weight(uint16_t working, int8_t low) {
    return as_float((uint32_t(working) << 16) + (uint32_t(int32_t(low)) << 8));
}

// `noise` of 8 bits rounds at random, 128 to the nearest. Half of the low byte's range lies on each side of the
// working copy, which is therefore the nearest bf16.
void set_weight(float value, uint32_t noise, uint16_t& working, int8_t& low) {
    const uint32_t bits = (as_bits(value) + noise) >> 8;
    working = uint16_t((bits + 128) >> 8);
    low = int8_t(bits);
}

// Codes count in steps of 2^SHIFT of the bits of an fp32, which are eight steps an octave, up to the block's `top`.
// The last code stands for `top`; of a signed one the first bit is the sign, and the rest 0 for zero.
template <bool SIGNED>
constexpr int32_t LAST = SIGNED ? 127 : 255;

template <bool SIGNED>
float decode(uint8_t code, int32_t top) {
    const int32_t steps = SIGNED ? code & 127 : code;
    const uint32_t bits = uint32_t(std::max(steps + top - LAST<SIGNED>, 0)) << SHIFT;
    if (!SIGNED) return as_float(bits);
    return as_float((steps ? bits : 0) | uint32_t(code & 128) << 24);
}

// `noise` of SHIFT bits rounds at random, 2^(SHIFT-1) to the nearest.
template <bool SIGNED>
uint8_t encode(float value, uint32_t noise, int32_t top) {
    const uint32_t bits = as_bits(value);
    const int32_t steps = int32_t(((bits & MAGNITUDE) + noise) >> SHIFT) - (top - LAST<SIGNED>);
    return uint8_t(std::max(steps, 0)) | uint8_t(SIGNED ? bits >> 24 & 128 : 0);
}

int16_t top_of(const float* values, int64_t count) {
    uint32_t most = 0;
    for (int64_t i = 0; i < count; i++) most = std::max(most, as_bits(values[i]) & MAGNITUDE);
    return int16_t((most + (1u << SHIFT) - 1) >> SHIFT);
}

// Calls `work(block, first, last, place)` for each block of a share of `numel` elements from element `offset` on:
// elements [first, last) of the share, which begin at `place` of the block.
template <class Work>
void each_block(int64_t offset, int64_t numel, Work work) {
    const int64_t lead = offset % BLOCK, blocks = (lead + numel + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) if (blocks >= 64)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t start = block * BLOCK - lead, first = std::max<int64_t>(start, 0);
        work(block, first, std::min(start + BLOCK, numel), first - start);
    }
}

template <bool SIGNED>
void read(const uint8_t* codes, const int16_t* tops, int64_t offset, int64_t numel, float* values) {
    each_block(offset, numel, [=](int64_t block, int64_t first, int64_t last, int64_t) {
        for (int64_t i = first; i < last; i++) values[i] = decode<SIGNED>(codes[i], tops[block]);
    });
}

template <bool SIGNED>
void write(uint8_t* codes, int16_t* tops, int64_t offset, int64_t numel, const float* values) {
    each_block(offset, numel, [=](int64_t block, int64_t first, int64_t last, int64_t) {
        const int32_t top = tops[block] = top_of(values + first, last - first);
        for (int64_t i = first; i < last; i++) codes[i] = encode<SIGNED>(values[i], 1u << (SHIFT - 1), top);
    });
}

// What Adam is told for a step. `rate`: the learning rate over the first moment's bias; `kept`: 1 - learning rate *
// weight decay; `unbias`: 1 / sqrt(the second moment's bias).
struct Rule {
    float rate, kept, beta1, beta2, unbias, eps;
};

// Elements of one block: `keys` are of its random bits, `place` is its first element's.
void step_block(uint16_t* __restrict working, int8_t* __restrict low, const uint16_t* __restrict gradients,
                uint8_t* __restrict first_codes, int16_t& first_top, uint8_t* __restrict second_codes,
                int16_t& second_top, int64_t count, uint64_t keys, int64_t place, const Rule rule) {
    float m[BLOCK], v[BLOCK];
    const int32_t old_m_top = first_top, old_v_top = second_top;
    for (int64_t i = 0; i < count; i++) {
        const float gradient = as_float(uint32_t(gradients[i]) << 16);
        m[i] = rule.beta1 * decode<true>(first_codes[i], old_m_top) + (1 - rule.beta1) * gradient;
        v[i] = rule.beta2 * decode<false>(second_codes[i], old_v_top) + (1 - rule.beta2) * (gradient * gradient);
    }
    const int32_t m_top = first_top = top_of(m, count), v_top = second_top = top_of(v, count);
    const uint32_t key = uint32_t(keys) + uint32_t(place), other_key = uint32_t(keys >> 32) + uint32_t(place);
    for (int64_t i = 0; i < count; i++) {
        const uint32_t noise = mix(key + uint32_t(i)), other = mix(other_key + uint32_t(i));
        const float old = rule.kept * weight(working[i], low[i]);
        const float value = old - rule.rate * (m[i] / (std::sqrt(v[i]) * rule.unbias + rule.eps));
        set_weight(value, other >> 24, working[i], low[i]);
        first_codes[i] = encode<true>(m[i], noise >> (32 - SHIFT), m_top);
        second_codes[i] = encode<false>(v[i], other & ((1u << SHIFT) - 1), v_top);
    }
}

}  // namespace

extern "C" {

void read_weights(const uint16_t* working, const int8_t* low, int64_t numel, float* values) {
    for (int64_t i = 0; i < numel; i++) values[i] = weight(working[i], low[i]);
}

void write_weights(uint16_t* working, int8_t* low, int64_t numel, const float* values) {
    for (int64_t i = 0; i < numel; i++) set_weight(values[i], 128, working[i], low[i]);
}

void read_first(const uint8_t* codes, const int16_t* tops, int64_t offset, int64_t numel, float* values) {
    read<true>(codes, tops, offset, numel, values);
}

void read_second(const uint8_t* codes, const int16_t* tops, int64_t offset, int64_t numel, float* values) {
    read<false>(codes, tops, offset, numel, values);
}

void write_first(uint8_t* codes, int16_t* tops, int64_t offset, int64_t numel, const float* values) {
    write<true>(codes, tops, offset, numel, values);
}

void write_second(uint8_t* codes, int16_t* tops, int64_t offset, int64_t numel, const float* values) {
    write<false>(codes, tops, offset, numel, values);
}

// `key`: of the random bits of this step and tensor.
void step(uint16_t* working, int8_t* low, const uint16_t* gradients, uint8_t* first_codes, int16_t* first_tops,
          uint8_t* second_codes, int16_t* second_tops, int64_t offset, int64_t numel, uint64_t key, float rate,
          float kept, float beta1, float beta2, float unbias, float eps) {
    const Rule rule{rate, kept, beta1, beta2, unbias, eps};
    each_block(offset, numel, [=](int64_t block, int64_t first, int64_t last, int64_t place) {
        step_block(working + first, low + first, gradients + first, first_codes + first, first_tops[block],
                   second_codes + first, second_tops[block], last - first,
                   mix(key ^ mix(uint64_t(offset / BLOCK + block))), place, rule);
    });
}

}  // extern "C"
