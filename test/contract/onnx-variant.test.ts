/**
 * LAMINA_ONNX_VARIANT: gateways and dense-executors take the graph that it names, of a directory and of a repository of
 * the hub, and say in one error what there is if it is not there. Every service is a process of its own.
 */
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { ROOT_DIRECTORY } from '@lamina/cli';
import { buildModel, pullModel } from '@lamina/model';
import { UncutReference, writeExport } from '@lamina/testkit';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { startTestCluster, type TestClusterOptions } from '../cluster.ts';
import { HubServer } from './hub-server.ts';

const PROMPT = Array.from({ length: 20 }, (_, i) => (i * 53) % 256);
/** A token that the graph of q4 has an embedding for and that of fp32 has not. */
const BEYOND_FP32 = 290;
const MAX_TOKENS = 8;

let scratch: string;
let dir: string;
const answers = new Map<string, readonly number[]>();

beforeAll(async () => {
  scratch = mkdtempSync(join(tmpdir(), 'lamina-variant-'));
  dir = join(scratch, 'model');
  await writeExport(dir, { operator: 'gqa' }, { seed: 1 });
  await writeExport(dir, { operator: 'gqa' }, { precision: 'q4', seed: 2, vocabSize: 300 });
  for (const variant of ['fp32', 'q4']) {
    const reference = await UncutReference.load(await buildModel(dir, { cacheDir: join(scratch, 'built'), variant }));
    answers.set(variant, (await reference.greedy(PROMPT, MAX_TOKENS, { ignoreEos: true })).tokenIds);
    await reference.release();
  }
  expect(answers.get('q4')).not.toEqual(answers.get('fp32'));
});

afterAll(() => rmSync(scratch, { recursive: true, force: true }));

/** What a cluster answers to the prompt, and what its gateway says to a token of q4 alone. */
async function ask(options: TestClusterOptions): Promise<{ tokens: readonly (number | null)[]; refusal?: string }> {
  const { settings, ...rest } = options;
  const cluster = await startTestCluster({
    attentionShards: 1,
    ...rest,
    settings: { kvDtype: 'f32', cacheDir: join(scratch, 'cache'), ...settings },
  });
  const body = { max_tokens: MAX_TOKENS, temperature: 0, ignore_eos: true };
  try {
    const answer = await cluster.generate({ ...body, token_ids: PROMPT });
    const [first] = await cluster.generate({ ...body, token_ids: [BEYOND_FP32], max_tokens: 1 });
    return { tokens: answer.map(({ token }) => token), refusal: first?.error?.message ?? '' };
  } finally {
    await cluster.stop();
  }
}

describe('LAMINA_ONNX_VARIANT', () => {
  it('picks the graph, by the setting and by the variable; without it fp32 is taken', async () => {
    const plain = await ask({ model: dir });
    expect(plain.tokens).toEqual(answers.get('fp32'));
    expect(plain.refusal).toContain('its tokens are 0 to 263');
    expect(await ask({ model: dir, settings: { onnxVariant: 'q4' } })).toEqual({
      tokens: answers.get('q4'),
      refusal: '',
    });
    const environment = { LAMINA_ONNX_VARIANT: 'q4' };
    expect(await ask({ model: dir, environment })).toEqual({ tokens: answers.get('q4'), refusal: '' });
  }, 60_000);

  it('that the model has not is one error that lists what it has', async () => {
    const started = startTestCluster({ model: dir, settings: { onnxVariant: 'int8' } });
    await expect(started).rejects.toMatchObject({
      code: 'model_invalid',
      message: expect.stringMatching(
        /^(gateway|dense-executor): .*\/model: has the variants fp32, q4, not int8; name one that it has$/,
      ),
    });
    await expect(startTestCluster({ settings: { onnxVariant: 'q4' } })).rejects.toThrow(
      /lamina-tiny: has no ONNX decoder, so none of the variant q4; name no variant/,
    );
  }, 60_000);

  it('of a repository pulls that variant, though what a gateway needs of its safetensors is cached', async () => {
    const hub = await HubServer.start();
    try {
      const names = readdirSync(dir, { recursive: true, encoding: 'utf8', withFileTypes: true });
      const files = names.filter((entry) => entry.isFile()).map(({ parentPath, name }) => join(parentPath, name));
      const contents = files.map((path) => [path.slice(dir.length + 1), readFileSync(path)] as const);
      const checkpoint = readFileSync(join(ROOT_DIRECTORY, 'models', 'lamina-tiny', 'model.safetensors'));
      hub.repos.set('owner/model', { files: { ...Object.fromEntries(contents), 'model.safetensors': checkpoint } });
      const cacheDir = join(scratch, 'hub-cache');
      const pulled = await pullModel('owner/model', { endpoint: hub.endpoint, cacheDir, textOnly: true });
      expect(pulled.variant).toBe('text');
      const environment = { HF_ENDPOINT: hub.endpoint, HF_TOKEN: '' };
      const settings = { cacheDir, onnxVariant: 'q4' };
      const asked = { model: 'owner/model', environment, settings };
      expect(await ask(asked)).toEqual({ tokens: answers.get('q4'), refusal: '' });
      await expect(ask({ ...asked, settings: { ...settings, onnxVariant: 'int8' } })).rejects.toThrow(
        /owner\/model: has no weights 'int8'; give --weights one of: safetensors, fp32, q4/,
      );
    } finally {
      await hub.stop();
    }
  }, 60_000);

  it('is passed on by the compose file to both services that read it', () => {
    const compose = readFileSync(join(ROOT_DIRECTORY, 'docker-compose.yml'), 'utf8');
    for (const service of ['gateway', 'dense-executor']) {
      const block = new RegExp(`^ {2}${service}:\\n((?: {4}.*\\n|\\n)*)`, 'm').exec(compose)?.[1];
      expect(block, service).toMatch(/^ {6}LAMINA_ONNX_VARIANT:$/m);
    }
  });
});
