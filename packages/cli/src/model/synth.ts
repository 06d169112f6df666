/** Owns `lamina model synth`: a model of a published shape with random weights; its directory on stdout. */
import { stat } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { SYNTHETIC_SHAPES, type SyntheticShapeName, writeSyntheticModel } from '@lamina/model';
import { LaminaError } from '@lamina/tensor';
import { cacheDirOf, type Environment } from './find-model.ts';
import { showBytes } from './progress.ts';

export interface SynthFlags {
  readonly weights: string;
  readonly seed: number;
}

function isShape(name: string): name is SyntheticShapeName {
  return Object.hasOwn(SYNTHETIC_SHAPES, name);
}

export async function runSynth(
  shape: string,
  dir: string | undefined,
  { weights, seed }: SynthFlags,
  environment: Environment,
): Promise<number> {
  if (!isShape(shape)) {
    const known = Object.keys(SYNTHETIC_SHAPES).join(', ');
    throw new LaminaError('config_invalid', `there is no shape "${shape}"; these are: ${known}`);
  }
  if (weights !== 'bf16' && weights !== 'f16') {
    throw new LaminaError('config_invalid', `--weights "${weights}": a checkpoint is written in bf16 or f16`);
  }
  const target = dir === undefined ? join(cacheDirOf(environment), 'synthetic', weights, shape) : resolve(dir);
  const isThere = dir === undefined && (await stat(target).catch(() => undefined)) !== undefined;
  if (!isThere) {
    const shown = showBytes(process.stderr, shape);
    await writeSyntheticModel(target, shape, { weights, seed, onProgress: shown.update }).finally(shown.done);
  }
  process.stderr.write(`${shape}: ${isThere ? 'is here already' : 'written'}; its answers mean nothing\n`);
  process.stdout.write(`${target}\n`);
  return 0;
}
