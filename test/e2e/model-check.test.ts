/** `lamina model check` as its users run it: real processes, more shards than one, a result on stdout. */
import { spawnSync } from 'node:child_process';
import { copyFileSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { ROOT_DIRECTORY } from '@lamina/cli';
import { writeExport } from '@lamina/testkit';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { TEST_CACHE_DIRECTORY } from '../cluster.ts';

let scratch: string;

beforeAll(() => {
  scratch = mkdtempSync(join(tmpdir(), 'lamina-check-'));
});

afterAll(() => rmSync(scratch, { recursive: true, force: true }));

function check(args: readonly string[], variables: Readonly<Record<string, string>> = {}) {
  const command = [join(ROOT_DIRECTORY, 'packages/cli/dist/main.js'), 'model', 'check', ...args];
  const { status, stdout, stderr } = spawnSync(process.execPath, command, {
    encoding: 'utf8',
    env: {
      PATH: process.env.PATH,
      LAMINA_NATS_SERVER: process.env.LAMINA_NATS_SERVER,
      LAMINA_CACHE_DIR: TEST_CACHE_DIRECTORY,
      // Nothing must need a hub.
      HF_ENDPOINT: 'http://127.0.0.1:9',
      ...variables,
    },
  });
  const worst = Number(/log-probabilities differ by (\S+) at most/.exec(stdout)?.[1]);
  return { status, stdout, stderr, worst };
}

const TINY = join(ROOT_DIRECTORY, 'models', 'lamina-tiny');

it('finds the bundled model equal to its uncut graph', () => {
  const args = [TINY, '--weights', 'f32', '--attention-shards', '3', '--max-tokens', '12'];
  // The services are told what the uncut graph has.
  const { status, stdout, stderr, worst } = check(args, { LAMINA_WEIGHTS: 'int4' });
  expect(stdout, stderr).toMatch(
    /equal: 48 tokens on 3 attention shards against the uncut graph \(f32 weights\), fp32 KV/,
  );
  expect(stdout.match(/ none$/gm)).toHaveLength(4);
  expect(worst).toBeLessThan(1e-4);
  expect(status).toBe(0);
}, 60_000);

it('finds a checkpoint equal in quantized weights', () => {
  const { status, stdout, stderr, worst } = check([TINY, '--weights', 'int8', '--max-tokens', '8']);
  expect(stdout, stderr).toMatch(/equal: \d+ tokens .* \(int8 weights\)/);
  // No rounding of float32 is so large: it is int8 that ran.
  expect(worst).toBeGreaterThan(1e-4);
  expect(status).toBe(0);
}, 60_000);

describe('a published ONNX decoder', () => {
  let dir: string;

  beforeAll(async () => {
    dir = join(scratch, 'published');
    // Other weights in each: a cluster that took another variant than the uncut graph would answer something else.
    await writeExport(dir, { operator: 'gqa', packed: true, localWindow: 24 }, { seed: 1 });
    await writeExport(dir, { operator: 'gqa' }, { precision: 'q4', externalData: true, seed: 2 });
    await writeExport(dir, { operator: 'gqa' }, { precision: 'int8', seed: 3 });
  });

  it.each([
    ['fp32 if nothing is named', [], {}, 'onnx/model.onnx', 1e-4],
    ['--weights q4', ['--weights', 'q4'], { LAMINA_ONNX_VARIANT: 'int8' }, 'onnx/model_q4.onnx', 1e-4],
    ['LAMINA_ONNX_VARIANT=int8', [], { LAMINA_ONNX_VARIANT: 'int8' }, 'onnx/model_int8.onnx', 0.5],
  ])(
    'is equal: %s',
    (_, flags, variables, graph, bound) => {
      const args = [dir, '--attention-shards', '3', '--max-tokens', '8', ...flags];
      const { status, stdout, stderr, worst } = check(args, variables);
      expect(stdout, stderr).toContain(`on 3 attention shards against the uncut graph (${graph}), fp32 KV`);
      expect(stdout).toMatch(bound === 1e-4 ? /^equal: 32 tokens/m : /^equal: /m);
      expect(worst).toBeLessThan(bound);
      expect(status).toBe(0);
    },
    60_000,
  );

  it('is equal in the layout of onnxruntime-genai', () => {
    const genai = join(scratch, 'genai');
    mkdirSync(genai);
    for (const name of ['tokenizer.json', 'tokenizer_config.json']) copyFileSync(join(dir, name), join(genai, name));
    writeFileSync(join(genai, 'model.onnx'), readFileSync(join(dir, 'onnx', 'model.onnx')));
    const model = { type: 'llama', context_length: 96, eos_token_id: [256], bos_token_id: 256 };
    writeFileSync(join(genai, 'genai_config.json'), JSON.stringify({ model }));
    const { status, stdout, stderr } = check([genai, '--max-tokens', '8']);
    expect(stdout, stderr).toMatch(/equal: 32 tokens .* \(model\.onnx\)/);
    expect(status).toBe(0);
  }, 60_000);
});
