/** The native reader of what nats-server says, against mutated streams: at memory's end, whole and in pieces. */
import { execFile } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';

const run = promisify(execFile);
const IS_LONG = process.env.LAMINA_FUZZ === 'long';
const NUM_STREAMS = IS_LONG ? 100_000_000 : 200_000;
const SEED = 7;
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
      const { stdout } = await run(program, [String(NUM_STREAMS), String(SEED)]);
      console.log(stdout.trim());
      const counts: Record<string, number> = JSON.parse(stdout);
      // Otherwise the mutations prove nothing.
      for (const [kind, count] of Object.entries(counts)) expect(count, kind).toBeGreaterThan(NUM_STREAMS / 50);
      expect(Object.keys(counts)).toHaveLength(8);
    } finally {
      rmSync(workDir, { recursive: true, force: true });
    }
  },
  TIMEOUT_MS,
);
