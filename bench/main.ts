/**
 * Owns `npm run bench`: which parts run, what is printed, the JSON file, the exit status.
 *
 * Invariants
 * 1. The status is 0 whatever the figures and 2 when a row could not be measured; `regress` alone ends with 1 on a bound
 *    that is broken.
 */
import { readFile, writeFile } from 'node:fs/promises';
import { cpus, loadavg } from 'node:os';
import { parseArgs } from 'node:util';
import { type Context, contextOf } from './context.ts';
import { decode } from './parts/decode.ts';
import { kernel } from './parts/kernel.ts';
import { latency } from './parts/latency.ts';
import { overhead } from './parts/overhead.ts';
import { overlap } from './parts/overlap.ts';
import { prefill } from './parts/prefill.ts';
import { scale } from './parts/scale.ts';
import { speculation } from './parts/speculation.ts';
import { regress } from './regress.ts';
import { lineOf, tableOf } from './report.ts';
import type { Row } from './rows.ts';

const PARTS: Readonly<Record<string, (context: Context) => Promise<Row[]>>> = {
  decode,
  prefill,
  kernel,
  overhead,
  overlap,
  scale,
  latency,
  speculation,
};
const USAGE =
  `usage: npm run bench -- [${Object.keys(PARTS).join('|')}|all]... [--quick] [--json FILE]\n` +
  '       npm run bench -- regress        ratios that must not get worse, for CI\n' +
  '       npm run bench -- report FILE    the rows of FILE as a markdown table\n';
/** Others use the machine from here on: what is measured then is not to be believed. */
const QUIET_LOAD = 0.5;

const say = (line: string): void => void process.stderr.write(`${line}\n`);

async function measure(parts: readonly string[], isQuick: boolean, json: string | undefined): Promise<number> {
  const context = contextOf(isQuick, say);
  say(`${cpus()[0]?.model.trim()}, ${context.threads} threads each side, Node ${process.versions.node}`);
  const [load = 0] = loadavg();
  if (load > QUIET_LOAD) say(`the machine is not quiet: load ${load.toFixed(1)}`);
  const rows: Row[] = [];
  for (const part of parts) {
    say(`${part} (${(process.uptime() / 60).toFixed(1)} min)`);
    const measuredRows = await PARTS[part]!(context);
    for (const row of measuredRows) process.stdout.write(`${lineOf(row)}\n`);
    rows.push(...measuredRows);
    if (json !== undefined) await writeFile(json, `${JSON.stringify(rows, null, 1)}\n`);
  }
  process.stdout.write(`\n${tableOf(rows)}`);
  return rows.some((row) => row.notMeasured !== null) ? 2 : 0;
}

async function main(): Promise<number> {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: { quick: { type: 'boolean', default: false }, json: { type: 'string' } },
  });
  const [first = 'all', file] = positionals;
  if (first === 'regress') return regress(say);
  if (first === 'report' && file !== undefined) {
    process.stdout.write(tableOf(JSON.parse(await readFile(file, 'utf8'))));
    return 0;
  }
  const parts = first === 'all' ? Object.keys(PARTS) : positionals;
  const unknown = parts.find((part) => PARTS[part] === undefined);
  if (unknown !== undefined) {
    process.stderr.write(`there is no part "${unknown}"\n${USAGE}`);
    return 2;
  }
  return measure(parts, values.quick, values.json);
}

process.exitCode = await main();
