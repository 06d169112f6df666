/**
 * Owns what a chaos run reports: one row per kind of fault, as a table and as JSON.
 *
 * Invariants
 * 1. A JSON file that exists is added to: a row takes the place of the one of the same fault, the others stay. So a long run
 *    can be done kind by kind.
 * 2. A row is in the file as soon as its scenario ends.
 */
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import type { Outcome } from './workload.ts';

export interface Percentiles {
  /** Milliseconds; null where nothing was measured. */
  readonly p50: number | null;
  readonly p99: number | null;
}

export interface ChaosRow extends Outcome {
  readonly fault: string;
  readonly seed: number;
  readonly form: 'short' | 'long';
  readonly faults: number;
  /** Faults of which a sign was seen. */
  readonly noticed: number;
  /** From the fault until a process of the cluster acts on it. */
  readonly detectMs: Percentiles;
  /** From the fault until the next token of each request that was running. */
  readonly resumeMs: Percentiles;
  readonly seconds: number;
}

export interface ReportOptions {
  readonly seed: number;
  readonly form: ChaosRow['form'];
  readonly jsonPath: string | undefined;
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
  readonly #options: ReportOptions;
  /** Every row of the JSON file, in its order, by fault. */
  readonly #kept: Map<unknown, unknown>;

  /** @throws TypeError when the JSON file is there and is none of a chaos run. */
  constructor(options: ReportOptions) {
    this.#options = options;
    this.#kept = options.jsonPath === undefined ? new Map() : keptRows(options.jsonPath);
  }

  add(measured: Omit<ChaosRow, 'seed' | 'form'>): void {
    const { seed, form, jsonPath } = this.#options;
    const row: ChaosRow = { ...measured, seed, form };
    this.#rows.push(row);
    this.#kept.set(row.fault, row);
    console.log(lineOf(row));
    if (jsonPath !== undefined) writeFileSync(jsonPath, `${JSON.stringify([...this.#kept.values()], null, 2)}\n`);
  }

  finish(): void {
    const { seed, form } = this.#options;
    console.log(`\n${form} form, seed ${seed}\n${HEADING}\n${this.#rows.map(lineOf).join('\n')}`);
  }
}

function keptRows(jsonPath: string): Map<unknown, unknown> {
  if (!existsSync(jsonPath)) return new Map();
  const refuse = (cause?: unknown): TypeError =>
    new TypeError(`--json ${jsonPath}: there is a file that is no report of a chaos run; name another`, { cause });
  let rows: unknown;
  try {
    rows = JSON.parse(readFileSync(jsonPath, 'utf8'));
  } catch (cause) {
    throw refuse(cause);
  }
  if (!Array.isArray(rows)) throw refuse();
  const entries = rows.map((row: unknown): [unknown, unknown] => {
    if (typeof row !== 'object' || row === null || !('fault' in row)) throw refuse();
    return [row.fault, row];
  });
  return new Map(entries);
}

const HEADING = [
  '| fault | requests | faults | noticed | lost | doubled | wrong | detect ms p50 / p99 | resume ms p50 / p99 | s |',
  '|---|---|---|---|---|---|---|---|---|---|',
].join('\n');

function lineOf({ fault, requests, faults, noticed, ...row }: ChaosRow): string {
  const { lost, doubled, wrong, detectMs, resumeMs, seconds } = row;
  const pair = ({ p50, p99 }: Percentiles): string => (p50 === null ? '-' : `${p50} / ${p99}`);
  const times = [pair(detectMs), pair(resumeMs), seconds];
  return `| ${[fault, requests, faults, noticed, lost, doubled, wrong, ...times].join(' | ')} |`;
}
