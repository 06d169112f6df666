/**
 * Owns a row of the results: what was compared, the figures, and whether they are good enough.
 *
 * Invariants
 * 1. A row that could not be measured has null figures and says why; it is never left out.
 */
import { median, type Pair, spread } from './statistics.ts';

export interface RowName {
  readonly part: string;
  readonly name: string;
  readonly unit: string;
  readonly peerName: string;
  /** What the ratio must reach; null where nothing is asked. */
  readonly mustReach: number | null;
  /** `at most`: a smaller ratio is better. */
  readonly bound?: 'at least' | 'at most';
}

export interface Row extends Required<RowName> {
  readonly ours: number | null;
  readonly peer: number | null;
  /** ours / peer. */
  readonly ratio: number | null;
  /** (largest - smallest) / median of the ratios of the rounds. */
  readonly spread: number | null;
  readonly runs: readonly Pair[];
  /** What was seen to be so while it was measured: contexts held, tokens counted. */
  readonly checks: readonly string[];
  readonly notMeasured: string | null;
}

export interface Measurement {
  readonly runs: readonly Pair[];
  readonly checks?: readonly string[];
}

function rowOf(name: RowName, { runs, checks = [] }: Measurement): Row {
  const ratios = runs.map(({ ours, peer }) => ours / peer);
  return {
    bound: 'at least',
    ...name,
    ours: median(runs.map(({ ours }) => ours)),
    peer: median(runs.map(({ peer }) => peer)),
    ratio: median(ratios),
    spread: spread(ratios),
    runs,
    checks,
    notMeasured: null,
  };
}

function missingRow(name: RowName, reason: string): Row {
  const none = { ours: null, peer: null, ratio: null, spread: null, runs: [], checks: [] };
  return { bound: 'at least', ...name, ...none, notMeasured: reason };
}

/** Whether the row reaches what it must; null when nothing is asked or it was not measured. */
export function isReached({ ratio, mustReach, bound }: Row): boolean | null {
  if (ratio === null || mustReach === null) return null;
  return bound === 'at least' ? ratio >= mustReach : ratio <= mustReach;
}

/** Measures one row. What keeps it from being measured is said in the row. */
export async function measured(name: RowName, measure: () => Promise<Measurement>): Promise<Row> {
  const [row] = await measuredTogether([name], async () => [await measure()]);
  return row!;
}

/** Measures rows that come out of one run, in the order of `names`; an Error in a row's place is why it has no figures. */
export async function measuredTogether(
  names: readonly RowName[],
  measure: () => Promise<readonly (Measurement | Error)[]>,
): Promise<Row[]> {
  try {
    const results = await measure();
    return names.map((name, i) => {
      const result = results[i]!;
      return result instanceof Error ? missingRow(name, result.message) : rowOf(name, result);
    });
  } catch (cause) {
    return names.map((name) => missingRow(name, errorOf(cause).message));
  }
}

export function errorOf(cause: unknown): Error {
  return cause instanceof Error ? cause : new Error(String(cause));
}
