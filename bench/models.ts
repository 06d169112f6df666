/**
 * Owns the models of the benchmark: published shapes with random weights, the same shape for every contestant.
 */
import { existsSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { SYNTHETIC_SHAPES, type SyntheticShapeName, writeSyntheticModel } from '@lamina/model';
import { type Quantization, writeGguf } from './gguf.ts';

export type Shape = (typeof SYNTHETIC_SHAPES)[SyntheticShapeName];

/** @throws RangeError for a name that is no shape. */
export function shapeOf(model: string): { name: SyntheticShapeName; shape: Shape } {
  for (const [name, shape] of Object.entries(SYNTHETIC_SHAPES)) {
    if (name === model && isShapeName(name)) return { name, shape };
  }
  throw new RangeError(`there is no shape ${model}`);
}

function isShapeName(name: string): name is SyntheticShapeName {
  return Object.hasOwn(SYNTHETIC_SHAPES, name);
}

/** Directory of the checkpoint, written if it is not there. */
export async function checkpointOf(directory: string, model: string): Promise<string> {
  const target = join(directory, 'checkpoints', model);
  if (!existsSync(target)) {
    await mkdir(join(directory, 'checkpoints'), { recursive: true });
    await writeSyntheticModel(target, shapeOf(model).name);
  }
  return target;
}

export const builtCacheOf = (directory: string): string => join(directory, 'built');

/** Path of the same shape as GGUF, written if it is not there. */
export async function ggufOf(directory: string, model: string, type: Quantization): Promise<string> {
  const target = join(directory, `${model}-${type}.gguf`);
  if (!existsSync(target)) {
    await mkdir(directory, { recursive: true });
    await writeGguf(target, shapeOf(model).shape, type);
  }
  return target;
}
