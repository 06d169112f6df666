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

  it('reports log-probabilities at temperature 1 and the most likely alternatives', () => {
    const logits = [1, 4, 2, 3];
    const result = new Sampler(4).sample(Float32Array.from(logits), row({ temperature: 0, numLogprobs: 2 }));
    const expected = softmax(logits, 1).map(Math.log);
    expect(result.logprob).toBeCloseTo(expected[1]!, 6);
    expect(result.topLogprobs.map(({ token }) => token)).toEqual([1, 3]);
    expect(result.topLogprobs[1]!.logprob).toBeCloseTo(expected[3]!, 6);
  });
});
