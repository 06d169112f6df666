/**
 * Head sizes: those that shards serve run whatever ONNX Runtime's own operators take, others are refused when the model
 * is read, before a shard is asked.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { buildModel, readModel } from '@lamina/model';
import { UncutReference, writeExport, writeRandomCheckpoint } from '@lamina/testkit';
import { afterAll, describe, expect, it } from 'vitest';
import { maxDifference, plainLogits } from '../src/reference-plain.ts';
import { StagedReference } from '../src/reference-staged.ts';

const scratch = mkdtempSync(join(tmpdir(), 'lamina-heads-'));
afterAll(() => rmSync(scratch, { recursive: true, force: true }));
let numDirs = 0;
const newDir = (): string => join(scratch, `model-${numDirs++}`);

const TOKENS = Array.from({ length: 20 }, (_, i) => (i * 37 + 11) % 256);

describe('heads of a checkpoint', () => {
  it.each([8, 24, 40, 80, 120, 256])(
    'of %d elements: uncut and staged equal a float64 forward pass',
    async (headDim) => {
      const dir = newDir();
      await writeRandomCheckpoint(dir, { headDim, numLayers: 2 });
      const built = await buildModel(dir, { cacheDir: join(scratch, 'cache') });
      const [uncut, staged] = [await UncutReference.load(built), await StagedReference.load(built)];
      const expected = await plainLogits(dir, TOKENS);
      const rows = await staged.runWave([{ sequence: staged.newSequence(), tokenIds: TOKENS }]);
      for (const found of [await uncut.logits(TOKENS), rows]) {
        expect(found.length).toBe(expected.length);
        for (const [i, row] of expected.entries()) {
          const largest = Math.max(...row.map(Math.abs));
          expect(maxDifference(found[i]!, row) / largest).toBeLessThan(2e-5);
        }
      }
      await Promise.all([uncut.release(), staged.release()]);
    },
  );

  it.each([4, 12, 20, 264])('of %d elements are refused', async (headDim) => {
    const dir = newDir();
    await writeRandomCheckpoint(dir, { headDim, numLayers: 2 });
    await expect(readModel(dir)).rejects.toThrow(
      `${join(dir, 'config.json')}: head_dim ${headDim} is nothing that attention shards serve; use a model whose heads have a multiple of 8 elements, 8 to 256`,
    );
  });
});

describe('heads of a published decoder', () => {
  it.each([12, 264])('of %d elements are refused', async (headDim) => {
    const dir = newDir();
    await writeExport(dir, { operator: 'eager', scaling: 'mul', mask: 'add' }, { headDim });
    const message = `${dir}: head_dim ${headDim} is nothing that attention shards serve`;
    await expect(readModel(dir)).rejects.toThrow(message);
    await expect(buildModel(dir, { cacheDir: join(scratch, 'cache') })).rejects.toThrow(message);
  });
});
