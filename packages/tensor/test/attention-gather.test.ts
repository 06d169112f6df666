/** The attention gather against a softmax in float64 over all keys at once. */
import fc from 'fast-check';
import { expect, test } from 'vitest';
import { AttentionGather } from '../src/attention-gather.ts';

const NEVER = Number.NEGATIVE_INFINITY;
/** Half a unit in the last place of a float32, relative. */
const EPSILON = 2 ** -24;

/** Keys of one (row, head): their scores and values, and the shard that holds each. */
interface Cell {
  readonly scores: readonly number[];
  readonly values: readonly (readonly number[])[];
  readonly shards: readonly number[];
}

interface Case {
  readonly numRows: number;
  readonly numHeads: number;
  readonly headDim: number;
  readonly numShards: number;
  /** The order in which the shards answer. */
  readonly order: readonly number[];
  readonly cells: readonly Cell[];
}

/** softmax(scores) . values and the log-sum-exp, in float64, over the keys that `isSeen` accepts. */
function attend(cell: Cell, headDim: number, isSeen: (shard: number) => boolean): { output: number[]; lse: number } {
  const keys = cell.scores.map((_, key) => key).filter((key) => isSeen(cell.shards[key]!));
  if (keys.length === 0) return { output: new Array<number>(headDim).fill(Number.NaN), lse: NEVER };
  const maximum = Math.max(...keys.map((key) => cell.scores[key]!));
  const weights = keys.map((key) => Math.exp(cell.scores[key]! - maximum));
  const sum = weights.reduce((total, weight) => total + weight, 0);
  const output = Array.from(
    { length: headDim },
    (_, d) => keys.reduce((total, key, i) => total + weights[i]! * cell.values[key]![d]!, 0) / sum,
  );
  return { output, lse: maximum + Math.log(sum) };
}

/**
 * What rounding may cost. A shard's log-sum-exp L is sent as float32, off by L * EPSILON, so each weight is off by the
 * factor exp(2 * L * EPSILON); each merge rounds the sum, the weight and the output a few times.
 */
function bound(cell: Cell, numShards: number): number {
  const largestScore = Math.max(1, ...cell.scores.map(Math.abs)) + Math.log(cell.scores.length + 1);
  const largestValue = Math.max(0, ...cell.values.flat().map(Math.abs));
  return largestValue * (2 * Math.expm1(2 * largestScore * EPSILON) + 8 * (numShards + 1) * EPSILON) + 1e-30;
}

function rowsOf(shard: number, { numRows, numHeads, cells }: Case): number[] {
  return Array.from({ length: numRows }, (_, row) => row).filter((row) =>
    cells.slice(row * numHeads, (row + 1) * numHeads).some((cell) => cell.shards.includes(shard)),
  );
}

/** The problems of gathering `each` with `gather`: empty when all is within its bound. */
function check(gather: AttentionGather, each: Case): string[] {
  const { numRows, numHeads, headDim, numShards, order, cells } = each;
  // Longer than needed and full of what must not matter.
  const output = new Float32Array((numRows * numHeads + 1) * headDim).fill(Number.NaN);
  gather.begin(output, numRows);
  for (const shard of order) {
    const rows = rowsOf(shard, each);
    const partials = rows.flatMap((row) =>
      Array.from({ length: numHeads }, (_, head) =>
        attend(cells[row * numHeads + head]!, headDim, (other) => other === shard),
      ),
    );
    gather.add(
      Float32Array.from(partials.flatMap((partial) => partial.output)),
      Float32Array.from(partials.map((partial) => partial.lse)),
      Int32Array.from(rows),
    );
  }
  const uncovered = gather.finish();
  const problems: string[] = [];
  const firstEmpty = cells.findIndex((cell) => cell.scores.length === 0);
  const expected = firstEmpty < 0 ? -1 : Math.floor(firstEmpty / numHeads);
  if (uncovered !== expected) problems.push(`finish() is ${uncovered}, not ${expected}`);
  cells.forEach((cell, index) => {
    const { output: exact } = attend(cell, headDim, () => true);
    const limit = bound(cell, numShards);
    for (let d = 0; d < headDim; d++) {
      const got = output[index * headDim + d]!;
      const off = cell.scores.length === 0 ? Math.abs(got) : Math.abs(got - exact[d]!);
      if (!(off <= limit)) problems.push(`cell ${index} [${d}]: ${got}, exactly ${exact[d]}, off ${off} > ${limit}`);
    }
  });
  if (!Number.isNaN(output[numRows * numHeads * headDim]!)) problems.push('wrote behind the last row');
  return problems;
}

function mustHold(problems: readonly string[]): void {
  if (problems.length > 0) throw new Error(problems.join('\n'));
}

function cases(numHeads: number, headDim: number, score: fc.Arbitrary<number>): fc.Arbitrary<Case> {
  const value = fc.double({ min: -4, max: 4, noNaN: true });
  return fc
    .record({ numRows: fc.integer({ min: 1, max: 5 }), numShards: fc.integer({ min: 1, max: 6 }) })
    .chain(({ numRows, numShards }) => {
      const key = fc.record({
        score,
        value: fc.array(value, { minLength: headDim, maxLength: headDim }),
        shard: fc.nat(numShards - 1),
      });
      const cell = fc.array(key, { maxLength: 12 }).map((keys) => ({
        scores: keys.map((each) => each.score),
        values: keys.map((each) => each.value),
        shards: keys.map((each) => each.shard),
      }));
      const shards = Array.from({ length: numShards }, (_, shard) => shard);
      return fc.record({
        numRows: fc.constant(numRows),
        numHeads: fc.constant(numHeads),
        headDim: fc.constant(headDim),
        numShards: fc.constant(numShards),
        order: fc.shuffledSubarray(shards, { minLength: numShards }),
        cells: fc.array(cell, { minLength: numRows * numHeads, maxLength: numRows * numHeads }),
      });
    });
}

const usual = fc.double({ min: -20, max: 20, noNaN: true });
const huge = fc.double({ min: -1e4, max: 1e4, noNaN: true });
const SEED = 20240501;

test.each([
  ['usual', usual],
  ['huge', huge],
  ['huge and close together', huge.map((score) => 9990 + score / 1000)],
  ['equal', fc.constant(-1e4)],
])('any split of the keys over shards, in any order, equals the softmax over all keys: %s scores', (_, score) => {
  fc.assert(
    fc.property(cases(2, 3, score), (each) => mustHold(check(new AttentionGather(2, 3), each))),
    { seed: SEED, numRuns: 300 },
  );
});

test('one gather serves step after step, larger and smaller ones', () => {
  fc.assert(
    fc.property(fc.array(cases(3, 4, usual), { minLength: 2, maxLength: 8 }), (steps) => {
      const gather = new AttentionGather(3, 4);
      mustHold(steps.flatMap((step) => check(gather, step)));
    }),
    { seed: SEED, numRuns: 100 },
  );
});

test('the output of a shard that saw no key is not read', () => {
  const gather = new AttentionGather(1, 2);
  const output = new Float32Array(2);
  gather.begin(output, 1);
  gather.add(Float32Array.of(Number.NaN, Number.NaN), Float32Array.of(NEVER), Int32Array.of(0));
  gather.add(Float32Array.of(1, 2), Float32Array.of(-1e4), Int32Array.of(0));
  gather.add(Float32Array.of(Number.NaN, Number.NaN), Float32Array.of(NEVER), Int32Array.of(0));
  expect(gather.finish()).toBe(-1);
  expect([...output]).toEqual([1, 2]);
});

test('the first row of which some head saw no key is reported, and is zero', () => {
  const gather = new AttentionGather(2, 1);
  const output = new Float32Array(8).fill(7);
  gather.begin(output, 4);
  gather.add(Float32Array.of(1, 1, 1, 1), Float32Array.of(0, 0, 0, NEVER), Int32Array.of(0, 2));
  expect(gather.finish()).toBe(1);
  expect([...output]).toEqual([1, 1, 0, 0, 1, 0, 0, 0]);
  gather.begin(output, 2);
  gather.add(Float32Array.of(1, 1), Float32Array.of(0, 0), Int32Array.of(0));
  gather.add(Float32Array.of(1, 1), Float32Array.of(NEVER, 0), Int32Array.of(1));
  expect(gather.finish()).toBe(1);
  gather.begin(output, 0);
  expect(gather.finish()).toBe(-1);
});

test('what is not a number in a partial reaches the output', () => {
  for (const lses of [
    [Number.NaN, 0],
    [0, Number.NaN],
  ]) {
    const gather = new AttentionGather(1, 1);
    const output = new Float32Array(1);
    gather.begin(output, 1);
    for (const lse of lses) gather.add(Float32Array.of(1), Float32Array.of(lse), Int32Array.of(0));
    expect(gather.finish()).toBe(-1);
    expect(output[0]).toBeNaN();
  }
});
