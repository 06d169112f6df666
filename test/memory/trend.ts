/**
 * Owns the trend of a quantity over time: the line of Theil and Sen, whose slope is the median of the slopes between all pairs
 * of points. A few points that lie elsewhere do not turn it, as they turn the line of least squares.
 * P. K. Sen, Estimates of the regression coefficient based on Kendall's tau, 1968.
 */
export interface Point {
  readonly atMs: number;
  readonly value: number;
}

/** What the line rises from the first point to the last, in percent of where it starts. Points are in order of time, two or more. */
export function growthPercent(points: readonly Point[]): number {
  const [first, last] = [points[0], points.at(-1)];
  if (first === undefined || last === undefined || last.atMs <= first.atMs)
    throw new RangeError('a trend needs two moments');
  const slopes = points.flatMap((from, index) =>
    points.slice(index + 1).map((to) => (to.value - from.value) / (to.atMs - from.atMs)),
  );
  const slope = median(slopes);
  const start = median(points.map(({ atMs, value }) => value - slope * (atMs - first.atMs)));
  return ((slope * (last.atMs - first.atMs)) / start) * 100;
}

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}
