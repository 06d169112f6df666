/** Sampling: filters, seeds, log-probabilities, against distributions computed plainly. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Sampler, type SamplingRow, uniform } from '../src/request/sampler.ts';

const row = (fields: Partial<SamplingRow> = {}): SamplingRow => ({
  temperature: 1,
  topP: 1,
  topK: 0,
  minP: 0,
  seed: 1,
  tokenIndex: 0,
  numLogprobs: -1,
  ...fields,
});

function softmax(logits: readonly number[], temperature: number): number[] {
  const maximum = Math.max(...logits);
  const weights = logits.map((logit) => Math.exp((logit - maximum) / temperature));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}

/** The filtered distribution, by the definition: top-k, renormalize, top-p, renormalize, min-p, renormalize. */
function filtered(logits: readonly number[], fields: SamplingRow): number[] {
  const normalize = (values: number[]): number[] => {
    const total = values.reduce((sum, value) => sum + value, 0);
    return values.map((value) => value / total);
  };
  let probabilities = softmax(logits, fields.temperature);
  const order = probabilities.map((_, token) => token).sort((a, b) => probabilities[b]! - probabilities[a]! || a - b);
  if (fields.topK > 0) {
    const kept = new Set(order.slice(0, fields.topK));
    probabilities = normalize(probabilities.map((value, token) => (kept.has(token) ? value : 0)));
  }
  if (fields.topP < 1) {
    let cumulative = 0;
    const kept = new Set<number>();
    for (const token of order) {
      if (kept.size > 0 && cumulative >= fields.topP) break;
      kept.add(token);
      cumulative += probabilities[token]!;
    }
    probabilities = normalize(probabilities.map((value, token) => (kept.has(token) ? value : 0)));
  }
  const maximum = Math.max(...probabilities);
  return normalize(probabilities.map((value) => (value >= fields.minP * maximum ? value : 0)));
}

/** What `Sampler` did before it had a radix sort, bit for bit: candidates by bounds on their weight, sorted by comparison. */
function sampledBySorting(logits: Float32Array, fields: SamplingRow): number {
  const maximum = logits.reduce((a, b) => Math.max(a, b));
  const inverseTemperature = 1 / fields.temperature;
  const weights = Float64Array.from(logits, (logit) => Math.exp((logit - maximum) * inverseTemperature));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  const wanted = fields.topK > 0 ? Math.min(fields.topK, weights.length) : weights.length;
  const floor = fields.topP === 1 ? fields.minP : 0;
  let candidates: number[] = [];
  for (const bound of [-4, -8, -16, -32, Number.NEGATIVE_INFINITY]) {
    const threshold = Math.max(Math.exp(bound), floor);
    candidates = Array.from(weights.keys()).filter((token) => weights[token]! >= threshold);
    const mass = candidates.reduce((sum, token) => sum + weights[token]!, 0);
    const isEnough = fields.topK > 0 ? candidates.length >= wanted : fields.topP < 1 && mass >= fields.topP * total;
    if (isEnough || threshold === floor) break;
  }
  candidates.sort((a, b) => weights[b]! - weights[a]! || a - b);
  candidates = candidates.slice(0, wanted);
  if (fields.topP < 1) {
    const mass = fields.topK > 0 ? candidates.reduce((sum, token) => sum + weights[token]!, 0) : total;
    let cumulative = 0;
    let count = 0;
    while (count < candidates.length && (count === 0 || cumulative < fields.topP * mass))
      cumulative += weights[candidates[count++]!]!;
    candidates = candidates.slice(0, count);
  }
  candidates = candidates.filter((token) => weights[token]! >= fields.minP);
  let rest = candidates.reduce((sum, token) => sum + weights[token]!, 0) * uniform(fields.seed, fields.tokenIndex);
  for (const token of candidates) {
    rest -= weights[token]!;
    if (rest < 0) return token;
  }
  return candidates.at(-1)!;
}

/** Like a model's: a bell of width 3 with a few tokens far above it. */
function bell(vocabSize: number, seed: number): Float32Array {
  const at = (i: number): number => Math.max(uniform(seed, i), 1e-12);
  const normal = (i: number): number => Math.sqrt(-2 * Math.log(at(2 * i))) * Math.cos(2 * Math.PI * at(2 * i + 1));
  return Float32Array.from({ length: vocabSize }, (_, i) => 3 * normal(i) + (i % 5000 === 7 ? 9 : 0));
}

describe('uniform', () => {
  it('is uniform over seeds and counters and never 1', () => {
    const numDraws = 100_000;
    const buckets = new Array<number>(20).fill(0);
    for (let i = 0; i < numDraws; i++) {
      const value = uniform(i % 317, Math.floor(i / 317));
      expect(value >= 0 && value < 1).toBe(true);
      buckets[Math.floor(value * 20)]!++;
    }
    const chiSquare = buckets.reduce((sum, count) => sum + (count - numDraws / 20) ** 2 / (numDraws / 20), 0);
    // 19 degrees of freedom: 43.8 is the 0.1 % quantile.
    expect(chiSquare).toBeLessThan(43.8);
  });

  it('depends on the high half of the seed too', () => {
    expect(uniform(7, 3)).not.toBe(uniform(7 + 2 ** 40, 3));
    expect(uniform(-7, 3)).not.toBe(uniform(7, 3));
  });
});

describe('Sampler', () => {
  it('takes the most likely token when greedy, the lower id of equals', () => {
    const sampler = new Sampler(5);
    expect(sampler.sample(Float32Array.of(0, 3, 1, 3, 2), row({ temperature: 0 })).token).toBe(1);
  });

  it('reports rows without a finite maximum', () => {
    const sampler = new Sampler(3);
    expect(sampler.sample(Float32Array.of(0, Number.NaN, 1), row()).token).toBe(-1);
    expect(sampler.sample(Float32Array.of(0, Number.POSITIVE_INFINITY, 1), row()).token).toBe(-1);
    expect(sampler.sample(new Float32Array(3).fill(Number.NEGATIVE_INFINITY), row()).token).toBe(-1);
    expect(sampler.sample(Float32Array.of(Number.NEGATIVE_INFINITY, 2, Number.NEGATIVE_INFINITY), row()).token).toBe(1);
  });

  it('draws from the filtered distribution', () => {
    const logits = [2, 1.5, 1, 0.5, 0, -1, -3, -8];
    const sampler = new Sampler(logits.length);
    const numDraws = 20_000;
    for (const fields of [
      {},
      { temperature: 0.5 },
      { topK: 3 },
      { topP: 0.7 },
      { minP: 0.2 },
      { topK: 5, topP: 0.8, minP: 0.25, temperature: 1.4 },
    ]) {
      const counts = new Array<number>(logits.length).fill(0);
      for (let i = 0; i < numDraws; i++)
        counts[sampler.sample(Float32Array.from(logits), row({ ...fields, seed: 99, tokenIndex: i })).token]!++;
      const expected = filtered(logits, row(fields));
      for (let token = 0; token < logits.length; token++) {
        const deviation = Math.abs(counts[token]! / numDraws - expected[token]!);
        expect(deviation, `${JSON.stringify(fields)} token ${token}`).toBeLessThan(
          5 * Math.sqrt((expected[token]! * (1 - expected[token]!)) / numDraws) + 1e-9,
        );
      }
    }
  });

  it('only ever draws tokens that pass the filters', () => {
    fc.assert(
      fc.property(
        // Steps of 1/64 are exact in float32, so ties are real ties.
        fc.array(
          fc.integer({ min: -1920, max: 1920 }).map((step) => step / 64),
          { minLength: 2, maxLength: 200 },
        ),
        fc.record({
          temperature: fc.double({ min: 0.05, max: 5, noNaN: true }),
          topK: fc.nat(50),
          topP: fc.double({ min: 0.01, max: 1, noNaN: true }),
          minP: fc.double({ min: 0, max: 1, noNaN: true }),
          seed: fc.maxSafeInteger(),
        }),
        (logits, fields) => {
          const { token } = new Sampler(logits.length).sample(Float32Array.from(logits), row(fields));
          const probabilities = filtered(logits, row(fields));
          // A token at the very edge of a filter may fall on either side by rounding.
          const best = probabilities.indexOf(Math.max(...probabilities));
          return (
            probabilities[token]! > 0 ||
            filtered(logits, row({ ...fields, topP: Math.min(1, fields.topP + 1e-9), minP: fields.minP - 1e-9 }))[
              token
            ]! > 0 ||
            token === best
          );
        },
      ),
      { numRuns: 2_000 },
    );
  });

  it('gives the same token for the same seed and index, whatever was sampled before', () => {
    const logits = Float32Array.from({ length: 1000 }, (_, token) => Math.sin(token) * 4);
    const fresh = new Sampler(1000).sample(logits, row({ seed: 5, tokenIndex: 17, topP: 0.9 })).token;
    const used = new Sampler(1000);
    for (let i = 0; i < 50; i++)
      used.sample(
        Float32Array.from(logits, (logit) => logit * -i),
        row({ seed: i, topK: i }),
      );
    expect(used.sample(logits, row({ seed: 5, tokenIndex: 17, topP: 0.9 })).token).toBe(fresh);
  });

  it('samples what sorting the whole vocabulary by comparison gives, to the bit', () => {
    const shape = fc.constantFrom(
      (logit: number) => logit,
      // Many equals, also of different sign.
      (logit: number) => Math.round(logit),
      () => 0.5,
      (logit: number) => (logit > 4 ? logit : Number.NEGATIVE_INFINITY),
      (logit: number) => -Math.abs(logit) * 1e-6,
    );
    const temperature = fc.constantFrom(0.004, 0.02, 0.3, 1, 3, 100);
    const fields = fc.oneof(
      fc.record({ temperature, topP: fc.constantFrom(0.5, 0.99, 0.9999999, 1 - 2 ** -53) }),
      fc.record({ temperature, topK: fc.constantFrom(2, 1023, 1024, 5000, 9999, 100_000) }),
      fc.record({ temperature, minP: fc.constantFrom(1e-300, 1e-9, 0.1, 0.97) }),
      fc.record({
        temperature,
        topP: fc.constantFrom(0.9, 0.999),
        topK: fc.constantFrom(2000, 9000),
        minP: fc.constant(0.01),
      }),
    );
    const samplers = new Map([900, 10_000].map((vocabSize) => [vocabSize, new Sampler(vocabSize)]));
    fc.assert(
      fc.property(fc.constantFrom(900, 10_000), shape, fields, fc.nat(), (vocabSize, shaped, filters, seed) => {
        const logits = bell(vocabSize, seed).map(shaped);
        const fully = row({ ...filters, seed });
        expect(samplers.get(vocabSize)!.sample(logits, fully).token).toBe(sampledBySorting(logits, fully));
      }),
      { numRuns: 300 },
    );
  });

  it('takes milliseconds where a filter leaves the whole of a large vocabulary', () => {
    const logits = bell(151_936, 3);
    const sampler = new Sampler(logits.length);
    const cpuMsOf = (filters: Partial<SamplingRow>): number => {
      const draw = (tokenIndex: number) => sampler.sample(logits, row({ temperature: 100, ...filters, tokenIndex }));
      for (let i = 0; i < 3; i++) draw(i);
      const before = process.cpuUsage();
      for (let i = 0; i < 15; i++) draw(i);
      const { user, system } = process.cpuUsage(before);
      return (user + system) / 1e3 / 15;
    };
    const plainMs = cpuMsOf({});
    // Three to six times; sorting by comparison took 35 times as long as no filter.
    for (const filters of [{ topP: 0.99 }, { topK: 100_000 }, { minP: 1e-9 }])
      expect(cpuMsOf(filters), JSON.stringify(filters)).toBeLessThan(15 * plainMs);
  });

  it('is greedy at the smallest temperatures, whose inverse is infinite', () => {
    const logits = Float32Array.of(0, 1, 3, 2);
    for (const filters of [{}, { topP: 0.9 }, { topK: 3 }, { minP: 0.1 }])
      expect(new Sampler(4).sample(logits, row({ temperature: 5e-324, ...filters })).token).toBe(2);
  });

  it('reports log-probabilities at temperature 1 and the most likely alternatives', () => {
    const logits = [1, 4, 2, 3];
    const result = new Sampler(4).sample(Float32Array.from(logits), row({ temperature: 0, numLogprobs: 2 }));
    const expected = softmax(logits, 1).map(Math.log);
    expect(result.logprob).toBeCloseTo(expected[1]!, 6);
    expect(result.topLogprobs.map(({ token }) => token)).toEqual([1, 3]);
    expect(result.topLogprobs[1]!.logprob).toBeCloseTo(expected[3]!, 6);
  });
});
