/** Owns what a chaos run reports: one row per kind of fault, as a table and as JSON. */
import { writeFileSync } from 'node:fs';
import type { Outcome } from './workload.ts';

export interface Percentiles {
  /** Milliseconds; null where nothing was measured. */
  readonly p50: number | null;
  readonly p99: number | null;
}

export interface ChaosRow extends Outcome {
  readonly fault: string;
  readonly faults: number;
  /** From the fault until a process of the cluster acts on it. */
  readonly detectMs: Percentiles;
  /** From the fault until the next token of each request that was running. */
  readonly resumeMs: Percentiles;
}

export function percentiles(valuesMs: readonly number[]): Percentiles {
  const sorted = [...valuesMs].sort((a, b) => a - b);
  const at = (share: number): number | null => {
    const value = sorted[Math.min(sorted.length - 1, Math.ceil(share * sorted.length) - 1)];
    return value === undefined ? null : Math.round(value);
  };
  return { p50: at(0.5), p99: at(0.99) };
}

export class Report {
  readonly #rows: ChaosRow[] = [];
  readonly #seed: number;
  readonly #jsonPath: string | undefined;

  constructor(seed: number, jsonPath: string | undefined) {
    this.#seed = seed;
    this.#jsonPath = jsonPath;
  }

  add(row: ChaosRow): void {
    this.#rows.push(row);
    console.log(lineOf(row));
  }

  finish(): void {
    console.log(`\nseed ${this.#seed}\n${HEADING}\n${this.#rows.map(lineOf).join('\n')}`);
    if (this.#jsonPath !== undefined) writeFileSync(this.#jsonPath, `${JSON.stringify(this.#rows, null, 2)}\n`);
  }
}

const HEADING =
  '| fault | requests | faults | lost | doubled | wrong | detect ms p50 / p99 | resume ms p50 / p99 |\n|---|---|---|---|---|---|---|---|';

function lineOf({ fault, requests, faults, lost, doubled, wrong, detectMs, resumeMs }: ChaosRow): string {
  const pair = ({ p50, p99 }: Percentiles): string => (p50 === null ? '-' : `${p50} / ${p99}`);
  return `| ${[fault, requests, faults, lost, doubled, wrong, pair(detectMs), pair(resumeMs)].join(' | ')} |`;
}
