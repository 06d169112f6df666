/** Random checkpoints: the same bytes each time, and a sharded one is the same model as a single file. */
import { mkdtemp, readFile, rm, unlink } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { buildModel, loadTokenizer, readModel } from '@lamina/model';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { writeRandomCheckpoint } from '../src/random-checkpoint.ts';

let scratch = '';
beforeAll(async () => {
  scratch = await mkdtemp(join(tmpdir(), 'lamina-random-'));
});
afterAll(async () => {
  await rm(scratch, { recursive: true, force: true });
});

async function weightsOf(dir: string): Promise<Buffer> {
  const { stagedGraphPath } = await buildModel(dir, { cacheDir: join(scratch, 'cache') });
  return readFile(join(dirname(stagedGraphPath), 'weights.bin'));
}

it('gives the same bytes for the same options', async () => {
  const [a, b, c] = [join(scratch, 'a'), join(scratch, 'b'), join(scratch, 'c')];
  await writeRandomCheckpoint(a, { seed: 7 });
  await writeRandomCheckpoint(b, { seed: 7 });
  await writeRandomCheckpoint(c, { seed: 8 });
  const [first, second, third] = await Promise.all([a, b, c].map((dir) => readFile(join(dir, 'model.safetensors'))));
  expect(first?.equals(second ?? Buffer.alloc(0))).toBe(true);
  expect(first?.equals(third ?? Buffer.alloc(0))).toBe(false);
});

it('is a complete model', async () => {
  const dir = join(scratch, 'complete');
  await writeRandomCheckpoint(dir, { numHeads: 8, numKvHeads: 2 });
  const model = await readModel(dir);
  expect(model.eosTokenIds).toEqual([256]);
  expect(model.generationDefaults.temperature).toBe(0);
  expect((await loadTokenizer(dir)).encode('aé<|end|>')).toEqual([0x61, 0xc3, 0xa9, 256]);
});

it('is the same model in several shards, and names a shard that is missing', async () => {
  const [single, sharded] = [join(scratch, 'single'), join(scratch, 'sharded')];
  await writeRandomCheckpoint(single, { tied: false });
  await writeRandomCheckpoint(sharded, { tied: false, shards: 3 });
  expect((await weightsOf(sharded)).equals(await weightsOf(single))).toBe(true);
  await unlink(join(sharded, 'model-2-of-3.safetensors'));
  await expect(weightsOf(sharded)).rejects.toThrow('model-2-of-3.safetensors: is missing');
});
