/** What is said of models that are damaged or not supported. All on copies of lamina-tiny. */
import { cp, mkdtemp, open, readdir, readFile, rename, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
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

/** Adds a head to lamina-tiny, whose head is tied: a copy of the embedding, `change`d. */
async function addHead(change: (head: Buffer) => void): Promise<void> {
  const path = join(dir, 'model.safetensors');
  const file = await readFile(path);
  const start = 8 + Number(file.readBigUInt64LE(0));
  const header: Record<string, { data_offsets: [number, number] }> = JSON.parse(file.toString('utf8', 8, start));
  const data = file.subarray(start);
  const { 'model.embed_tokens.weight': embedding } = header;
  const [from = 0, to = 0] = embedding?.data_offsets ?? [];
  const head = Buffer.from(data.subarray(from, to));
  change(head);
  const lm_head = { ...embedding, data_offsets: [data.byteLength, data.byteLength + head.byteLength] };
  const text = Buffer.from(JSON.stringify({ ...header, 'lm_head.weight': lm_head }));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.byteLength));
  await writeFile(path, Buffer.concat([length, text, data, head]));
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

  it.each([
    ['a list', [{ name: 'default', template: 'hello' }]],
    ['an object', { tool_use: 'tools', default: 'hello' }],
  ])('takes the template named default of %s', async (_, chat_template) => {
    await editJson('tokenizer_config.json', { chat_template });
    expect((await readModel(dir)).chatTemplate).toBe('hello');
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

  it('is reported when bytes belong to no tensor', async () => {
    const before = await readFile(file());
    await editHeader('[262144, 262400]', '[262144, 262144]');
    await editHeader('"shape": [128]', '"shape": [  0]');
    await expectInvalid(file(), 'are of no tensor');
    await writeFile(file(), Buffer.concat([before, Buffer.alloc(100)]));
    await expectInvalid(file(), 'its last 100 bytes are of no tensor');
  });

  it('is reported when offsets run backwards', async () => {
    await editHeader('[262144, 262400]', '[262400, 262144]');
    await expectInvalid(file(), 'not 256');
  });

  it('is reported when a weight is not finite', async () => {
    const handle = await open(file(), 'r+');
    const { size } = await handle.stat();
    await handle.write(Uint8Array.of(0, 0x7c), 0, 2, size - 2);
    await handle.close();
    await expectInvalid(file(), 'NaN or infinite');
  });
});

describe('a head that config.json says is tied', () => {
  it('may lie in the checkpoint as a copy', async () => {
    await addHead(() => {});
    await buildModel(dir, { cacheDir });
  });

  it('is refused if it has values of its own, and used if config.json says so', async () => {
    await addHead((head) => head.writeUInt16LE(0x3c00, head.byteLength - 2));
    await expectInvalid("tensor 'lm_head.weight' has other values", 'set tie_word_embeddings to false');
    await editJson('config.json', { tie_word_embeddings: false });
    await buildModel(dir, { cacheDir });
  });
});

describe('a sharded checkpoint', () => {
  const index = 'model.safetensors.index.json';
  const part = 'part.safetensors';
  beforeEach(() => rename(join(dir, 'model.safetensors'), join(dir, part)));

  it('is not asked for where there is a single file', async () => {
    await rename(join(dir, part), join(dir, 'model.safetensors'));
    await writeFile(join(dir, index), JSON.stringify({ weight_map: { lost: 'model-00001-of-00002.safetensors' } }));
    await buildModel(dir, { cacheDir });
  });

  it('is reported when the index names a file that is missing', async () => {
    const weight_map = { 'model.norm.weight': 'model-00002-of-00002.safetensors' };
    await writeFile(join(dir, index), JSON.stringify({ weight_map }));
    await expectInvalid(join(dir, 'model-00002-of-00002.safetensors'), 'is missing');
  });

  it('is reported when a file has not what the index says', async () => {
    const weight_map = { 'model.norm.weight': part, lost: part };
    await writeFile(join(dir, index), JSON.stringify({ weight_map }));
    await expectInvalid(join(dir, index), "part.safetensors has tensor 'lost', but it has not");
  });

  it.each(['../model.safetensors', '/etc/passwd', 'weights.bin', '..'])(
    'does not leave its directory: %s',
    async (name) => {
      await writeFile(join(dir, index), JSON.stringify({ weight_map: { 'model.norm.weight': name } }));
      await expectInvalid(join(dir, index), 'no safetensors file beside it');
    },
  );
});
