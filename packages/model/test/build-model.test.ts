/** The build cache, and what is said of models that are damaged or not supported. All on copies of lamina-tiny. */
import { cp, mkdir, mkdtemp, open, readdir, readFile, rm, stat, truncate, utimes, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { LaminaError } from '@lamina/tensor';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { buildModel } from '../src/build-model.ts';
import { readModel } from '../src/model-description.ts';

const TINY = fileURLToPath(new URL('../../../models/lamina-tiny', import.meta.url));

let scratch = '';
let dir = '';
let cacheDir = '';
beforeAll(async () => {
  scratch = await mkdtemp(join(tmpdir(), 'lamina-model-'));
});
afterAll(async () => {
  await rm(scratch, { recursive: true, force: true });
});
beforeEach(async () => {
  const own = await mkdtemp(join(scratch, 'test-'));
  dir = join(own, 'model');
  cacheDir = join(own, 'cache');
  await cp(TINY, dir, { recursive: true });
});

async function editJson(name: string, fields: Record<string, unknown>): Promise<void> {
  const value: Record<string, unknown> = JSON.parse(await readFile(join(dir, name), 'utf8'));
  await writeFile(join(dir, name), JSON.stringify({ ...value, ...fields }));
}

/** Replaces text of the safetensors header by text of the same length. */
async function editHeader(from: string, to: string): Promise<void> {
  expect(to).toHaveLength(from.length);
  const path = join(dir, 'model.safetensors');
  const bytes = await readFile(path);
  const at = bytes.indexOf(from);
  expect(at).toBeGreaterThan(0);
  bytes.write(to, at, 'latin1');
  await writeFile(path, bytes);
}

async function errorOf(promise: Promise<unknown>): Promise<LaminaError> {
  const error = await promise.then(
    () => new Error('it did not fail'),
    (reason: unknown) => reason,
  );
  if (!(error instanceof LaminaError)) throw error;
  return error;
}

async function expectInvalid(...fragments: readonly string[]): Promise<void> {
  const error = await errorOf(buildModel(dir, { cacheDir }));
  expect(error.code).toBe('model_invalid');
  for (const fragment of fragments) expect(error.message).toContain(fragment);
  // What is wrong; what to do.
  expect(error.message).toMatch(/: .+; .+/);
  expect(await readdir(cacheDir).catch(() => [])).toEqual([]);
}

describe('readModel', () => {
  it('describes lamina-tiny', async () => {
    expect(await readModel(TINY)).toMatchObject({
      modelId: 'lamina-tiny',
      attention: { numLayers: 6, numHeads: 4, numKvHeads: 2, headDim: 32, scale: 1 / Math.sqrt(32) },
      contextLength: 1024,
      vocabSize: 1024,
      hiddenSize: 128,
      numStages: 7,
      eosTokenIds: [0],
      bosTokenId: 0,
      addBosToken: false,
      generationDefaults: {
        doSample: true,
        temperature: 0.7,
        topP: 0.9,
        topK: null,
        minP: null,
        maxNewTokens: 200,
      },
    });
  });

  it('takes several end tokens, greedy defaults and a template file', async () => {
    await editJson('generation_config.json', { eos_token_id: [0, 7, 7], do_sample: false });
    await writeFile(join(dir, 'chat_template.jinja'), 'hello');
    const model = await readModel(dir);
    expect(model.eosTokenIds).toEqual([0, 7]);
    expect(model.generationDefaults.temperature).toBe(0);
    expect(model.chatTemplate).toBe('hello');
  });

  it('does without generation_config.json, head_dim and num_key_value_heads', async () => {
    await rm(join(dir, 'generation_config.json'));
    await editJson('config.json', { head_dim: null, num_key_value_heads: null, eos_token_id: null });
    const model = await readModel(dir);
    expect(model.eosTokenIds).toEqual([]);
    expect(model.generationDefaults.temperature).toBeNull();
    expect(model.attention).toMatchObject({ numKvHeads: 4, headDim: 32 });
  });

  it.each([
    [{ model_type: 'gpt_neox' }, "model_type 'gpt_neox' is not supported yet"],
    [{ rope_scaling: { rope_type: 'llama3', factor: 8 } }, "rope_scaling 'llama3' is not supported yet"],
    [{ rope_parameters: { rope_type: 'yarn' } }, "rope_parameters 'yarn' is not supported yet"],
    [{ sliding_window: 128 }, 'sliding_window 128 is not supported yet'],
    [{ hidden_act: 'gelu' }, "hidden_act 'gelu' is not supported yet"],
    [{ quantization_config: { bits: 4 } }, 'quantized checkpoints are not supported yet'],
    [{ num_key_value_heads: 3 }, 'no multiple of num_key_value_heads 3'],
    [{ hidden_size: '128' }, 'hidden_size'],
    [{ vocab_size: 0 }, 'vocab_size'],
  ])('rejects config.json with %j', async (fields, fragment) => {
    await editJson('config.json', fields);
    await expectInvalid('config.json', fragment);
  });

  it.each(['config.json', 'tokenizer.json', 'tokenizer_config.json', 'model.safetensors'])(
    'names %s when it is missing',
    async (name) => {
      await rm(join(dir, name));
      await expectInvalid(join(dir, name), 'is missing');
    },
  );

  it.each(['config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json'])(
    'names %s when it is no JSON',
    async (name) => {
      await writeFile(join(dir, name), '{"a": ');
      await expectInvalid(join(dir, name), 'is not valid JSON');
    },
  );

  it('names a directory that does not exist', async () => {
    dir = join(dir, 'nowhere');
    await expectInvalid(dir, 'does not exist');
  });
});

describe('a damaged checkpoint', () => {
  const file = (): string => join(dir, 'model.safetensors');

  it.each([4, 500, 1_000_000])('is reported when truncated to %d bytes', async (bytes) => {
    await truncate(file(), bytes);
    await expectInvalid(file(), 'is truncated');
  });

  it('is reported when it is no safetensors file', async () => {
    await writeFile(file(), 'version https://git-lfs.github.com/spec/v1\n');
    await expectInvalid(file(), 'is no safetensors file');
  });

  it('is reported when its header is no JSON', async () => {
    await editHeader('{"', '{{');
    await expectInvalid(file(), 'header is not valid JSON');
  });

  it('is reported when a tensor is missing', async () => {
    await editHeader('layers.3.mlp.up_proj', 'layers.3.mlp.xx_proj');
    await expectInvalid(dir, "no tensor 'model.layers.3.mlp.up_proj.weight'");
  });

  it('is reported when a tensor has another shape than config.json asks for', async () => {
    await editJson('config.json', { intermediate_size: 256 });
    await expectInvalid(file(), 'has shape [384,128], but config.json asks for [256,128]');
  });

  it('is reported when bytes and shape of a tensor disagree', async () => {
    await editHeader('[1024, 128]', '[1023, 128]');
    await expectInvalid(file(), "tensor 'model.embed_tokens.weight'", 'not 261888');
  });

  it('is reported when a dtype is not known', async () => {
    await editHeader('"F16"', '"Q16"');
    await expectInvalid(file(), "dtype 'Q16'", 'F32, F16 or BF16');
  });

  it('is reported when tensors overlap', async () => {
    await editHeader('[262144, 262400]', '[262140, 262396]');
    await expectInvalid(file(), 'overlaps');
  });

  it('is reported when a weight is not finite', async () => {
    const handle = await open(file(), 'r+');
    const { size } = await handle.stat();
    await handle.write(Uint8Array.of(0, 0x7c), 0, 2, size - 2);
    await handle.close();
    await expectInvalid(file(), 'NaN or infinite');
  });
});

describe('the build cache', () => {
  it('builds once and is reused', async () => {
    const progress: number[] = [];
    const first = await buildModel(dir, { cacheDir, onProgress: (fraction) => progress.push(fraction) });
    expect(progress).toEqual([...progress].sort((a, b) => a - b));
    expect(progress.at(-1)).toBe(1);
    const before = await stat(first.stagedGraphPath);
    const again: number[] = [];
    const second = await buildModel(dir, { cacheDir, onProgress: (fraction) => again.push(fraction) });
    expect(second).toEqual(first);
    expect(again).toEqual([1]);
    expect((await stat(second.stagedGraphPath)).ino).toBe(before.ino);
    expect(await readdir(cacheDir)).toHaveLength(1);
  });

  it('builds again when a weight or the configuration changes, not when sampling defaults do', async () => {
    const first = await buildModel(dir, { cacheDir });
    await editJson('generation_config.json', { temperature: 0.1 });
    expect((await buildModel(dir, { cacheDir })).stagedGraphPath).toBe(first.stagedGraphPath);
    await editJson('config.json', { rms_norm_eps: 1e-6 });
    const second = await buildModel(dir, { cacheDir });
    const handle = await open(join(dir, 'model.safetensors'), 'r+');
    await handle.write(Uint8Array.of(1), 0, 1, 1_500_000);
    await handle.close();
    const third = await buildModel(dir, { cacheDir });
    expect(new Set([first, second, third].map(({ stagedGraphPath }) => stagedGraphPath)).size).toBe(3);
  });

  it('lets several build at once: all get the one result', async () => {
    const built = await Promise.all(Array.from({ length: 4 }, () => buildModel(dir, { cacheDir })));
    expect(new Set(built.map(({ stagedGraphPath }) => stagedGraphPath)).size).toBe(1);
    expect(await readdir(cacheDir)).toHaveLength(1);
  });

  it('builds again what was damaged in the cache', async () => {
    const first = await buildModel(dir, { cacheDir });
    await truncate(first.stagedGraphPath, 10);
    const second = await buildModel(dir, { cacheDir });
    expect(second.stagedGraphPath).toBe(first.stagedGraphPath);
    expect((await stat(second.stagedGraphPath)).size).toBeGreaterThan(1000);
    expect(await readdir(cacheDir)).toHaveLength(1);
  });

  it('removes what a killed build left behind, and leaves a running one alone', async () => {
    const { stagedGraphPath } = await buildModel(dir, { cacheDir });
    const target = dirname(stagedGraphPath);
    await rm(target, { recursive: true });
    const [abandoned, running] = [`${target}.1.partial`, `${target}.2.partial`];
    await mkdir(abandoned);
    await mkdir(running);
    await utimes(abandoned, 0, 0);
    await buildModel(dir, { cacheDir });
    const left = (await readdir(cacheDir)).map((name) => join(cacheDir, name));
    expect(left.sort()).toEqual([target, running]);
  });

  it('says so when the cache directory cannot be written', async () => {
    const file = join(dir, 'config.json');
    const error = await errorOf(buildModel(dir, { cacheDir: file }));
    expect(error.code).toBe('config_invalid');
    expect(error.message).toContain('give a writable cache directory');
  });
});
