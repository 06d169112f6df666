/** `lamina model check` as its users run it: real processes, more shards than one, a result on stdout. */
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { ROOT_DIRECTORY } from '@lamina/cli';
import { expect, it } from 'vitest';
import { TEST_CACHE_DIRECTORY } from '../cluster.ts';

it('finds the bundled model equal to its uncut graph', () => {
  const model = join(ROOT_DIRECTORY, 'models', 'lamina-tiny');
  const command = ['model', 'check', model, '--attention-shards', '3', '--max-tokens', '12'];
  const { status, stdout, stderr } = spawnSync(
    process.execPath,
    [join(ROOT_DIRECTORY, 'packages/cli/dist/main.js'), ...command],
    {
      encoding: 'utf8',
      env: {
        PATH: process.env.PATH,
        LAMINA_NATS_SERVER: process.env.LAMINA_NATS_SERVER,
        LAMINA_CACHE_DIR: TEST_CACHE_DIRECTORY,
        // Nothing must need a hub.
        HF_ENDPOINT: 'http://127.0.0.1:9',
      },
    },
  );
  expect(stdout, stderr).toMatch(/equal: 48 tokens on 3 attention shards against the uncut graph/);
  expect(stdout.match(/ none$/gm)).toHaveLength(4);
  expect(status).toBe(0);
}, 60_000);
