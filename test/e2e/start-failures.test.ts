/**
 * Processes that cannot start: each ends with status 1 and one line that names what is wrong and what to do.
 */
import { spawn } from 'node:child_process';
import { cpSync, mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Cluster, ROOT_DIRECTORY } from '@lamina/cli';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { MODEL, start } from './tiny-cluster.ts';

/** Runs a service by itself and returns how it ended. */
function runService(service: string, args: readonly string[]): Promise<{ status: number | null; stderr: string }> {
  return new Promise((resolve) => {
    const child = spawn(
      process.execPath,
      [join(ROOT_DIRECTORY, 'services', service, 'dist', 'main.js'), '--log-level', 'silent', ...args],
      { stdio: ['ignore', 'ignore', 'pipe'] },
    );
    let stderr = '';
    child.stderr.on('data', (chunk) => {
      stderr += String(chunk);
    });
    child.on('exit', (status) => resolve({ status, stderr }));
  });
}

describe('a process that cannot start', () => {
  let cluster: Cluster;
  let scratch: string;
  let damaged: string;
  beforeAll(async () => {
    scratch = mkdtempSync(join(tmpdir(), 'lamina-e2e-'));
    cluster = await start({}, { attentionShards: 1 });
    damaged = join(scratch, 'damaged');
    cpSync(MODEL, damaged, { recursive: true });
  }, 60_000);
  afterAll(async () => {
    await cluster.stop();
    rmSync(scratch, { recursive: true, force: true });
  });

  const oneLine = (result: { status: number | null; stderr: string }): string => {
    expect(result.status).toBe(1);
    expect(result.stderr.trim().split('\n'), result.stderr).toHaveLength(1);
    return result.stderr;
  };

  const natsFlags = (): string[] => ['--nats-url', cluster.natsUrl, '--nats-password-file', cluster.passwords!];

  it('says that NATS is not reachable and what to do', async () => {
    expect(
      oneLine(
        await runService('attention-shard', ['--nats-url', 'nats://127.0.0.1:1', '--nats-connect-timeout-ms', '100']),
      ),
    ).toMatch(/no nats-server answers at nats:\/\/127.0.0.1:1.*nats-server -js/);
  });

  it('says that the model is missing', async () => {
    expect(oneLine(await runService('dense-executor', [...natsFlags(), '--model', '/nowhere']))).toMatch(
      /\/nowhere.*\[model_invalid\]/,
    );
  });

  it('says that the weights are cut off', async () => {
    truncateSync(join(damaged, 'model.safetensors'), 1_000_000);
    expect(
      oneLine(
        await runService('dense-executor', [
          ...natsFlags(),
          '--model',
          damaged,
          '--cache-dir',
          join(scratch, 'other-cache'),
        ]),
      ),
    ).toMatch(/model\.safetensors.*\[model_invalid\]/);
  });

  it('says that the tokenizer is damaged', async () => {
    writeFileSync(join(damaged, 'tokenizer.json'), '{"model": ');
    expect(oneLine(await runService('gateway', [...natsFlags(), '--model', damaged, '--http-port', '0']))).toMatch(
      /tokenizer\.json.*\[model_invalid\]/,
    );
  });

  it('says which port is taken', async () => {
    const server = createServer();
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    const address = server.address();
    const port = typeof address === 'object' && address !== null ? address.port : 0;
    expect(
      oneLine(await runService('gateway', [...natsFlags(), '--model', MODEL, '--http-port', String(port)])),
    ).toMatch(new RegExp(`${port}.*\\[address_in_use\\]`));
    server.close();
  });

  it('says which setting is wrong', async () => {
    const result = await runService('attention-shard', ['--kv-budget-bytes', 'lots']);
    expect(result.status).toBe(1);
    expect(result.stderr).toMatch(/--kv-budget-bytes \/ LAMINA_KV_BUDGET_BYTES: "lots" must be/);
  });

  it('says that a shard is too small for one block', async () => {
    expect(oneLine(await runService('attention-shard', [...natsFlags(), '--kv-budget-bytes', '100']))).toMatch(/block/);
  });
});
