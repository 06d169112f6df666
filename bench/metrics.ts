/** Owns reading /metrics of a cluster: sums of a series over all instances, and what a step costs by cause. */

import { sleep } from './processes.ts';

export type Metrics = ReadonlyMap<string, number>;

/** A gateway gives the same to all who ask within a second. */
const MAX_AGE_MS = 1_000;
let readAtMs = Number.NEGATIVE_INFINITY;

/** As they are now: not sooner after another reading than the gateway's are new. */
export async function readMetrics(httpUrl: string): Promise<Metrics> {
  const waitMs = readAtMs + MAX_AGE_MS - performance.now();
  if (waitMs > 0) await sleep(waitMs);
  const response = await fetch(`${httpUrl}/metrics`);
  readAtMs = performance.now();
  const sums = new Map<string, number>();
  for (const line of (await response.text()).split('\n')) {
    const match = /^([a-z_]+)(?:\{(.*)\})? ([-+0-9.eE]+)$/.exec(line);
    if (match === null) continue;
    const [, name = '', labels = '', value] = match;
    const part = /part="([a-z]+)"/.exec(labels)?.[1];
    const key = part === undefined ? name : `${name}/${part}`;
    sums.set(key, (sums.get(key) ?? 0) + Number(value));
  }
  return sums;
}

export const STEP_PARTS = ['dense', 'wait', 'codec', 'sample', 'schedule', 'machine', 'total'] as const;

export interface StepCosts {
  readonly numSteps: number;
  /** Milliseconds of one step by cause. */
  readonly ms: Readonly<Record<(typeof STEP_PARTS)[number], number>>;
}

/** Mean of the steps between two readings. @throws RangeError when there was none. */
export function stepCosts(before: Metrics, after: Metrics): StepCosts {
  const grown = (key: string): number => (after.get(key) ?? 0) - (before.get(key) ?? 0);
  const numSteps = grown('lamina_steps_total');
  if (numSteps <= 0) throw new RangeError('no step was completed');
  const of = (part: string): number => (1000 * grown(`lamina_step_seconds_sum/${part}`)) / numSteps;
  return {
    numSteps,
    ms: {
      dense: of('dense'),
      wait: of('wait'),
      codec: of('codec'),
      sample: of('sample'),
      schedule: of('schedule'),
      machine: of('machine'),
      total: of('total'),
    },
  };
}
