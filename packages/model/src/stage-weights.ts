/**
 * Owns what each stage of a checkpoint's decoder weighs, from its headers alone: nothing is built or read.
 *
 * Invariants
 * 1. A stage is charged with every weight that it uses. A tied embedding is used by the first stage and the last, and
 *    counts once in a total. Rotary tables, which all stages share, are charged to the first.
 */
import type { ModelConfig } from './model-config.ts';
import { Checkpoint } from './safetensors.ts';
import type { Weight } from './weight.ts';
import { type LayerWeights, layOutWeights } from './weight-layout.ts';
import type { WeightFormat } from './weight-storage.ts';

export interface StageWeights {
  readonly stage: number;
  readonly parameters: number;
  readonly bytes: number;
}

export interface ModelWeights {
  readonly stages: readonly StageWeights[];
  /** Of the model, every weight once; without rotary tables, which are no parameters. */
  readonly parameters: number;
  readonly bytes: number;
}

/** What the products of a graph are computed with: `int8` where activations are rounded to 8 bits before them. */
export type Activations = 'float32' | 'float16' | 'int8';

/** Throws model_invalid, as a build of the same checkpoint would. */
export async function checkpointStageWeights(
  dir: string,
  config: ModelConfig,
  format: WeightFormat,
): Promise<ModelWeights> {
  const checkpoint = await Checkpoint.open(dir);
  try {
    const layout = layOutWeights(config, {
      format,
      activationBits: 8,
      checkpoint,
      locationOf: (path) => path,
      weightsPath: '',
    });
    const first = [layout.embedding, layout.positions, ...layout.rotary.flatMap(({ cos, sin }) => [cos, sin])];
    const last = [...weightsIn(layout.finalNorm), layout.head];
    const stages = Array.from({ length: layout.layers.length + 1 }, (_, stage): StageWeights => {
      const before = layout.layers[stage - 1];
      const after = layout.layers[stage];
      const weights = [
        ...(before === undefined ? first : afterAttention(before)),
        ...(after === undefined ? last : beforeAttention(after)),
      ].filter((weight) => weight !== null);
      return { stage, parameters: sum(weights, parametersOf), bytes: sum(weights, bytesOf) };
    });
    const all = [...new Set([...layout.all, ...last])].filter((weight) => weight !== null);
    return { stages, parameters: sum(all, parametersOf), bytes: sum(all, bytesOf) };
  } finally {
    await checkpoint.close();
  }
}

function beforeAttention(layer: LayerWeights): (Weight | null)[] {
  return [
    ...weightsIn(layer.inputNorm),
    layer.qkv,
    layer.qkvBias,
    ...weightsIn(layer.queryNorm),
    ...weightsIn(layer.keyNorm),
  ];
}

function afterAttention(layer: LayerWeights): (Weight | null)[] {
  return [
    layer.output,
    layer.outputBias,
    ...weightsIn(layer.attentionOutputNorm),
    ...weightsIn(layer.mlpInputNorm),
    layer.gateUp,
    layer.gateUpBias,
    layer.down,
    layer.downBias,
    ...weightsIn(layer.mlpOutputNorm),
  ];
}

function weightsIn(norm: LayerWeights['inputNorm']): (Weight | null)[] {
  return norm === null ? [] : [norm.gamma, norm.beta];
}

function sum(weights: readonly Weight[], of: (weight: Weight) => number): number {
  return weights.reduce((total, weight) => total + of(weight), 0);
}

function parametersOf({ source, dims }: Weight): number {
  return source.kind === 'rotary' ? 0 : dims.reduce((a, b) => a * b, 1);
}

function bytesOf({ storage }: Weight): number {
  switch (storage.kind) {
    case 'dense':
      return storage.tensor.byteLength;
    case 'in_place':
      return storage.tensors.reduce((total, { byteLength }) => total + byteLength, 0);
    case 'blocks':
    case 'integers':
      return storage.values.byteLength + storage.scales.byteLength;
  }
}
