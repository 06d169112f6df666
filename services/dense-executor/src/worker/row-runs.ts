/**
 * Owns gathering rows of a wave into a message: rows that follow each other are copied together.
 */

/** Consecutive rows of the wave that go to consecutive rows of a message: start, length pairs. */
export function toRuns(rows: Int32Array): Int32Array<ArrayBuffer> {
  const runs: number[] = [];
  for (let i = 0; i < rows.length; i++) {
    if (i > 0 && rows[i] === rows[i - 1]! + 1) runs[runs.length - 1]!++;
    else runs.push(rows[i]!, 1);
  }
  return Int32Array.from(runs);
}

/** Copies rows of `source` [numTokens, width] to `target` from element `at` on. Returns the element after the last one. */
export function packRows(
  target: Float32Array,
  at: number,
  source: Float32Array,
  runs: Int32Array,
  width: number,
): number {
  let next = at;
  for (let i = 0; i < runs.length; i += 2) {
    const start = runs[i]! * width;
    const length = runs[i + 1]! * width;
    target.set(start === 0 && length === source.length ? source : source.subarray(start, start + length), next);
    next += length;
  }
  return next;
}
