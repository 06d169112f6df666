/** Synthetic models are complete Hugging Face directories. The published shapes are too large to write here. */
import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { buildModel } from '../src/build-model.ts';
import { Checkpoint } from '../src/safetensors.ts';
import { writeSyntheticModel } from '../src/synth.ts';
import { SYNTHETIC_SHAPES, type SyntheticShape, syntheticTensors } from '../src/synth-shapes.ts';
import { syntheticTokenizer } from '../src/synth-tokenizer.ts';
import { loadTokenizer } from '../src/tokenizer.ts';

const SMALL: SyntheticShape = {
  ...SYNTHETIC_SHAPES['smollm2-135m'],
  hiddenSize: 64,
  intermediateSize: 96,
  numLayers: 2,
  numHeads: 4,
  numKvHeads: 2,
  headDim: 16,
  vocabSize: 3000,
  contextLength: 128,
};

let scratch = '';
beforeAll(async () => {
  scratch = await mkdtemp(join(tmpdir(), 'lamina-synth-'));
});
afterAll(async () => {
  await rm(scratch, { recursive: true, force: true });
});

describe('writeSyntheticModel', () => {
  it.each([
    ['llama', 'bf16', SMALL],
    ['llama', 'f16', { ...SMALL, tied: false }],
    ['qwen2', 'bf16', { ...SMALL, modelType: 'qwen2' }],
    ['qwen3', 'f16', { ...SMALL, modelType: 'qwen3' }],
  ] as const)('writes a %s model in %s that can be built', async (name, weights, shape) => {
    const dir = join(scratch, `${name}-${weights}`);
    let progress: number[] = [];
    await writeSyntheticModel(dir, shape, { weights, onProgress: (done, total) => (progress = [done, total]) });
    expect(progress[0]).toBe(progress[1]);
    const { description } = await buildModel(dir, { cacheDir: join(scratch, 'cache') });
    expect(description.eosTokenIds).toEqual([2999]);
    expect((await loadTokenizer(dir)).vocabSize).toBe(3000);
  });

  it('writes the same bytes for the same seed, in several files if asked', async () => {
    const [one, other] = [join(scratch, 'one'), join(scratch, 'other')];
    const maxShardBytes = 400_000;
    await writeSyntheticModel(one, SMALL, { seed: 5, maxShardBytes });
    await writeSyntheticModel(other, SMALL, { seed: 5, maxShardBytes });
    const names = (await readdir(one)).filter((name) => name.endsWith('.safetensors'));
    expect(names).toEqual(['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']);
    for (const name of await readdir(one)) {
      expect((await readFile(join(one, name))).equals(await readFile(join(other, name)))).toBe(true);
    }
  });

  it('gives weights of the spread that it says', async () => {
    const dir = join(scratch, 'spread');
    await writeSyntheticModel(dir, SMALL, {});
    const checkpoint = await Checkpoint.open(dir);
    const raw = await checkpoint.tensor('model.embed_tokens.weight', [3000, 64]).read(0, 3000 * 64 * 2);
    await checkpoint.close();
    const bits = new Uint16Array(raw.buffer, raw.byteOffset, raw.byteLength / 2);
    const values = new Float32Array(Uint32Array.from(bits, (word) => word << 16).buffer);
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    const spread = Math.sqrt(values.reduce((sum, value) => sum + value * value, 0) / values.length);
    expect(Math.abs(mean)).toBeLessThan(1e-3);
    expect(spread * Math.sqrt(64)).toBeCloseTo(1, 0);
  });

  it('leaves a directory that is there alone', async () => {
    const dir = join(scratch, 'taken');
    await mkdir(dir);
    await writeFile(join(dir, 'precious.txt'), 'x');
    const error: unknown = await writeSyntheticModel(dir, SMALL, {}).catch((reason: unknown) => reason);
    expect(error).toMatchObject({ code: 'config_invalid' });
    expect(await readdir(dir)).toEqual(['precious.txt']);
    expect((await readdir(scratch)).filter((name) => name.includes('partial'))).toEqual([]);
  });
});

describe('the tokenizer of synthetic models', () => {
  it('has every size that a shape asks for, and encodes any text', async () => {
    for (const { vocabSize } of Object.values(SYNTHETIC_SHAPES)) syntheticTokenizer(vocabSize);
    const dir = join(scratch, 'text');
    await writeSyntheticModel(dir, { ...SMALL, vocabSize: 49_152 }, {});
    const tokenizer = await loadTokenizer(dir);
    const text = 'Once upon a time there was a little girl, 7 years old: Größe, 東京 😀.';
    const ids = tokenizer.encode(text);
    expect(Math.max(...ids)).toBeLessThan(49_150);
    expect(ids.length).toBeLessThan(text.length * 0.9);
    expect(Buffer.concat(ids.map((id) => tokenizer.tokenBytes(id))).toString()).toBe(text);
  });
});

describe('the shapes', () => {
  it('have the parameters that their names say', () => {
    const millions = Object.values(SYNTHETIC_SHAPES).map((shape) => {
      let count = 0;
      for (const { dims } of syntheticTensors(shape)) count += dims.reduce((a, b) => a * b, 1);
      return Math.round(count / 1e6);
    });
    expect(millions).toEqual([135, 362, 494, 596, 1236, 8030]);
  });
});
