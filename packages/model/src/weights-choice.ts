/**
 * Owns what one name for weights means in a directory: how a checkpoint is stored, or a variant of an ONNX decoder.
 *
 * Invariants
 * 1. A directory that has no safetensors has variants only. One that has both takes a name that is a format as that of
 *    the checkpoint, `int8` say; its variant of that name is meant by BuildOptions.variant alone.
 */
import { resolve } from 'node:path';
import { LaminaError } from '@lamina/tensor';
import { findPublishedGraph, publishedGraphs } from './slicer/published-model.ts';
import { WEIGHT_FORMATS, type WeightFormat } from './weight-storage.ts';

/** One of the two is named, the other left to its default. */
export interface WeightsChoice {
  readonly weights?: WeightFormat;
  readonly variant?: string;
}

/** @throws LaminaError `model_invalid` or `config_invalid` that lists what there is. */
export async function chooseWeights(dir: string, name: string): Promise<WeightsChoice> {
  const { graphs, isCheckpoint } = await publishedGraphs(resolve(dir));
  if (graphs.size > 0 && !isCheckpoint) {
    await findPublishedGraph(resolve(dir), name);
    return { variant: name };
  }
  const weights = WEIGHT_FORMATS.find((format) => format === name);
  if (weights !== undefined) return { weights };
  if (graphs.has(name)) return { variant: name };
  const variants = graphs.size === 0 ? '' : `, nor of the ONNX variants ${[...graphs.keys()].sort().join(', ')}`;
  throw new LaminaError('config_invalid', `--weights "${name}" is none of: ${WEIGHT_FORMATS.join(', ')}${variants}`);
}
