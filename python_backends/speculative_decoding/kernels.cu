// What is done where the logits are. LOGIT, their type, is defined by the caller; THREADS threads work on each row.
#include <cuda_fp16.h>

#define THREADS 512
#define TWO_TO_32 4294967296.0
#define NOTHING Best{__longlong_as_double(0xfff0000000000000ull), 0x7fffffff}  // worse than any
typedef unsigned long long u64;

// How one token is to be chosen: sampling.WISH, field by field. `key` is the noise's.
struct Wish {
    u64 key;
    float temperature, top_p, least;  // least: log of min-p
    int top_k;
};

// adjustments.ENTRY and adjustments.PLACE, field by field.
struct Entry {
    int token, times;
    unsigned flags;
    float bias;
};
struct Place {
    int begin, end, drafted, is_early;
    float repetition, frequency, presence;
};
#define SEEN 0x80000000u
#define END 0x40000000u

// The greatest value of a row and the lowest column that has it, as NumPy's argmax.
struct Best {
    double value;
    int column;
};

__device__ Best better(Best one, Best other) {
    bool is_other = other.value > one.value || (other.value == one.value && other.column < one.column);
    return is_other ? other : one;
}

__device__ Best best_of_block(Best mine) {
    __shared__ Best all[THREADS];
    all[threadIdx.x] = mine;
    for (int half = THREADS / 2; half; half >>= 1) {
        __syncthreads();
        if (threadIdx.x < half) all[threadIdx.x] = better(all[threadIdx.x], all[threadIdx.x + half]);
    }
    __syncthreads();
    Best found = all[0];
    __syncthreads();
    return found;
}

__device__ Best likeliest(const LOGIT* row, int columns) {
    Best mine = NOTHING;
    for (int column = threadIdx.x; column < columns; column += THREADS)
        mine = better(mine, Best{(double)(float)row[column], column});
    return best_of_block(mine);
}

// splitmix64 on a counter, then -log(-log(uniform)): noise.gumbel.
__device__ double gumbel(u64 key, int column) {
    u64 bits = (u64)column * 0x9E3779B97F4A7C15ull + key;
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9ull;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBull;
    bits = (bits ^ (bits >> 31)) >> 32;
    return -log(-log(((double)bits + 0.5) / TWO_TO_32));
}

// Keys are ordered as logits are, the lower column first where they tie: what a filter keeps is all keys from one on.
__device__ u64 key_of(float scaled, unsigned column) {
    unsigned bits = __float_as_uint(scaled);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (u64)bits << 32 | ~column;
}

__device__ float scaled_to(float logit, float greatest, float temperature) {
    return (logit - greatest) / temperature;
}

#define WEIGHT_LOG 22.18070977791825  // of 2^32, the weight of a row's likeliest column

__device__ u64 weight_of(float scaled) {  // in fixed point: sums do not depend on their order then
    return (u64)((double)expf(scaled) * TWO_TO_32);
}

// Return the least of the greatest keys from `floor` on that weigh `wanted` together, each 1 or its probability: a radix
// selection by bytes.
__device__ u64 select(
    const LOGIT* row, int columns, float greatest, float temperature, u64 floor, u64 wanted, bool by_weight
) {
    __shared__ u64 weights[256];
    __shared__ unsigned counts[256];
    __shared__ u64 prefix, left;
    __shared__ bool is_found;
    if (threadIdx.x == 0) { prefix = 0; left = wanted; is_found = false; }
    for (int shift = 56; shift >= 0; shift -= 8) {
        for (int bin = threadIdx.x; bin < 256; bin += THREADS) weights[bin] = counts[bin] = 0;
        __syncthreads();
        for (int column = threadIdx.x; column < columns; column += THREADS) {
            float scaled = scaled_to((float)row[column], greatest, temperature);
            u64 key = key_of(scaled, column);
            if (key < floor || (shift < 56 && key >> (shift + 8) != prefix >> (shift + 8))) continue;
            int bin = key >> shift & 255;
            atomicAdd(&counts[bin], 1u);
            if (by_weight) atomicAdd(&weights[bin], weight_of(scaled));
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int bin = 255, last = 255;
            for (; bin >= 0; bin--) {
                if (!counts[bin]) continue;
                u64 weight = by_weight ? weights[bin] : counts[bin];
                last = bin;
                if (weight >= left) break;
                left -= weight;
            }
            prefix |= (u64)last << shift;
            is_found = bin < 0 || counts[last] == 1 || (!by_weight && counts[last] == left);
        }
        __syncthreads();
        if (is_found) break;
    }
    u64 found = prefix > floor ? prefix : floor;
    __syncthreads();
    return found;
}

__device__ u64 weight_from(const LOGIT* row, int columns, float greatest, float temperature, u64 floor) {
    __shared__ u64 total;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    u64 mine = 0;
    for (int column = threadIdx.x; column < columns; column += THREADS) {
        float scaled = scaled_to((float)row[column], greatest, temperature);
        if (key_of(scaled, column) >= floor) mine += weight_of(scaled);
    }
    atomicAdd(&total, mine);
    __syncthreads();
    u64 sum = total;
    __syncthreads();
    return sum;
}

extern "C" __global__ void argmax(const LOGIT* logits, int* chosen, int columns) {
    Best best = likeliest(logits + (long long)blockIdx.x * columns, columns);
    if (threadIdx.x == 0) chosen[blockIdx.x] = best.column;
}

// sampling.Sampler.choose for each row of logits: temperature, min-p, top-k, top-p, Gumbel noise.
extern "C" __global__ void choose(const LOGIT* logits, const Wish* wishes, int* chosen, int columns) {
    const LOGIT* row = logits + (long long)blockIdx.x * columns;
    Wish wish = wishes[blockIdx.x];
    Best best = likeliest(row, columns);
    if (wish.temperature > 0) {
        float greatest = best.value, temperature = wish.temperature;
        u64 floor = key_of(wish.least, 0xffffffffu);
        if (wish.top_k > 0 && wish.top_k < columns)
            floor = select(row, columns, greatest, temperature, floor, wish.top_k, false);
        if (wish.top_p < 1) {
            double total = weight_from(row, columns, greatest, temperature, floor);
            // All that are less likely than this sum to less than 1 - top_p.
            float likely = log(total * (1 - wish.top_p) / columns) - WEIGHT_LOG - 1e-3;
            u64 bound = key_of(likely, 0xffffffffu), wanted = ceil(wish.top_p * total);
            floor = select(row, columns, greatest, temperature, floor > bound ? floor : bound, wanted, true);
        }
        double least = gumbel(wish.key, best.column) - MAX_GUMBEL;  // no noise lifts what is below it to the top
        Best mine = NOTHING;
        for (int column = threadIdx.x; column < columns; column += THREADS) {
            float scaled = scaled_to((float)row[column], greatest, temperature);
            if (scaled >= least && key_of(scaled, column) >= floor)
                mine = better(mine, Best{scaled + gumbel(wish.key, column), column});
        }
        best = best_of_block(mine);
    }
    if (threadIdx.x == 0) chosen[blockIdx.x] = best.column;
}

// adjustments.adjust for each row of logits. No token has two entries of a row.
extern "C" __global__ void adjust(
    const LOGIT* logits, const Entry* entries, const Place* places, float* adjusted, int columns
) {
    const LOGIT* row = logits + (long long)blockIdx.x * columns;
    float* own = adjusted + (long long)blockIdx.x * columns;
    Place place = places[blockIdx.x];
    for (int column = threadIdx.x; column < columns; column += THREADS) own[column] = (float)row[column];
    __syncthreads();
    for (int at = place.begin + threadIdx.x; at < place.end; at += THREADS) {
        Entry entry = entries[at];
        if (entry.token >= columns) continue;
        float value = own[entry.token] + entry.bias;
        if (place.is_early && entry.flags & END) value = __int_as_float(0xff800000);  // -infinity
        int drafted = __popc(entry.flags & ((1u << place.drafted) - 1)), times = entry.times + drafted;
        if (entry.flags & SEEN || drafted) {
            value = value > 0 ? value / place.repetition : value * place.repetition;
            value = (float)((double)value - (double)place.frequency * times);
            if (times > 0) value -= place.presence;
        }
        own[entry.token] = value;
    }
}

// Feed each row of a draft what was chosen after its last fed token, and say so in `proposals`.
extern "C" __global__ void advance(
    const int* chosen, long long* tokens, int* past, int* counts, int* proposals, int rows, int width
) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    int fed = counts[row];
    int token = fed ? chosen[row * width + fed - 1] : 0;
    proposals[row] = token;
    tokens[row * width] = token;
    past[row] += fed;
    counts[row] = fed ? 1 : 0;
}

// Fill in those fed tokens that are negative: what a draft proposed after each row's first.
extern "C" __global__ void complete(long long* tokens, const int* proposals, int size, int width, int stride) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at < size && tokens[at] < 0) tokens[at] = proposals[(at % width - 1) * stride + at / width];
}

// Count, at each row's first token, how many of those fed after it were chosen, one after another.
extern "C" __global__ void accept(
    const int* chosen, const long long* tokens, const int* counts, int* standing, int rows, int width, int logits
) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= logits) return;
    int stands = 0;
    if (at < rows * width && at % width == 0)
        while (stands + 1 < counts[at / width] && tokens[at + stands + 1] == chosen[at + stands]) stands++;
    standing[at] = stands;
}
