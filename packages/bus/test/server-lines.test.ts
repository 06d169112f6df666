/** The native reader of what nats-server says, against mutated streams: at memory's end, whole and in pieces. */
import { execFile } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';
import { count, IS_LONG, secondsSince, tell } from '../../../test/fuzz-report.ts';

const run = promisify(execFile);
const NUM_STREAMS = IS_LONG ? 100_000_000 : 200_000;
/** One after the other, each with a seed of its own, so that it can be seen how far they are. */
const NUM_PARTS = IS_LONG ? 20 : 1;
const SEED = 6;
const TIMEOUT_MS = IS_LONG ? 900_000 : 60_000;

test(
  `${NUM_STREAMS} mutated streams: nothing is read beyond them, and pieces say what the whole says`,
  async () => {
    const workDir = mkdtempSync(join(tmpdir(), 'lamina-server-lines-'));
    const fileOf = (path: string): string => fileURLToPath(new URL(path, import.meta.url));
    try {
      const program = join(workDir, 'fuzz');
      const sources = [fileOf('server-lines-fuzz.cc'), fileOf('../native/server_lines.cc')];
      await run(process.env.CXX || 'c++', ['-std=c++17', '-O2', '-Wall', '-Wextra', ...sources, '-o', program]);
      const startedMs = performance.now();
      const counts: Record<string, number> = {};
      for (let part = 1; part <= NUM_PARTS; part++) {
        const { stdout } = await run(program, [String(NUM_STREAMS / NUM_PARTS), String(SEED + part)]);
        const ofPart: Record<string, number> = JSON.parse(stdout);
        for (const [kind, number] of Object.entries(ofPart)) counts[kind] = (counts[kind] ?? 0) + number;
        tell(`${count((part / NUM_PARTS) * NUM_STREAMS)} streams in ${secondsSince(startedMs)}`);
      }
      console.log(JSON.stringify(counts));
      // Otherwise the mutations prove nothing.
      for (const [kind, number] of Object.entries(counts)) expect(number, kind).toBeGreaterThan(NUM_STREAMS / 50);
      expect(Object.keys(counts)).toHaveLength(8);
    } finally {
      rmSync(workDir, { recursive: true, force: true });
    }
  },
  TIMEOUT_MS,
);
