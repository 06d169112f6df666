/**
 * Owns what is known of a model without building or running it: stages, cut edges, KV, the interconnect it needs.
 *
 * Invariants
 * 1. Every unit stands in a name: this is what --json prints.
 */

import {
  DEFAULT_WEIGHT_FORMAT,
  type ModelWeights,
  readModel,
  readStageWeights,
  WEIGHT_FORMATS,
  type WeightFormat,
} from '@lamina/model';
import { type AttentionSpec, LaminaError } from '@lamina/tensor';
import { type Interconnect, interconnectOf, WIRE_BYTES } from './interconnect.ts';

export interface InspectOptions {
  readonly weights?: string;
  readonly batch: number;
  readonly context?: number;
  readonly mtimeMs?: number;
  readonly atimeMs?: number;
  readonly alpha?: number;
}

const DEFAULT_ALPHA = 0.2;
const DEFAULT_CONTEXT = 1024;

export interface CutEdge {
  readonly name: 'query' | 'key' | 'value' | 'attention' | 'hidden';
  readonly from: string;
  readonly to: string;
  readonly elementsPerToken: number;
  readonly bytesPerToken: number;
}

export interface Inspection {
  readonly modelId: string;
  readonly dir: string;
  readonly architecture: string;
  readonly contextLength: number;
  readonly vocabSize: number;
  readonly hiddenSize: number;
  readonly numStages: number;
  readonly attention: AttentionSpec;
  /** Of one token at one attention node. */
  readonly cutEdges: readonly CutEdge[];
  /** Between an executor and the shards, all attention nodes, both ways. */
  readonly wireBytesPerToken: number;
  readonly kvBytesPerToken: { readonly f16: number; readonly f32: number };
  readonly weightFormat: WeightFormat;
  /** null: an ONNX decoder, whose weights are not read here. */
  readonly weights: ModelWeights | null;
  readonly interconnect: Interconnect;
}

export async function inspectModel(dir: string, options: InspectOptions): Promise<Inspection> {
  const weightFormat = requireFormat(options.weights);
  const description = await readModel(dir);
  const { attention, modelId, contextLength, vocabSize, hiddenSize, numStages, config } = description;
  const weights = await readStageWeights(dir, weightFormat);
  const cutEdges = cutEdgesOf(attention, hiddenSize);
  const onWire = cutEdges.filter(({ name }) => name !== 'hidden');
  const kvElements = attention.numLayers * 2 * attention.numKvHeads * attention.headDim;
  return {
    modelId,
    dir: description.dir,
    architecture: config?.modelType ?? 'ONNX decoder',
    contextLength,
    vocabSize,
    hiddenSize,
    numStages,
    attention,
    cutEdges,
    wireBytesPerToken: attention.numLayers * onWire.reduce((sum, { bytesPerToken }) => sum + bytesPerToken, 0),
    kvBytesPerToken: { f16: kvElements * 2, f32: kvElements * 4 },
    weightFormat,
    weights,
    interconnect: interconnectOf({
      attention,
      batch: options.batch,
      context: options.context ?? Math.min(DEFAULT_CONTEXT, contextLength),
      parameters: weights?.parameters ?? 0,
      weightBytes: weights?.bytes ?? 0,
      alpha: { value: options.alpha ?? DEFAULT_ALPHA, origin: options.alpha === undefined ? 'assumed' : 'given' },
      mtimeMs: options.mtimeMs,
      atimeMs: options.atimeMs,
    }),
  };
}

function cutEdgesOf({ numHeads, numKvHeads, headDim }: AttentionSpec, hiddenSize: number): CutEdge[] {
  const edge = (name: CutEdge['name'], from: string, to: string, elementsPerToken: number): CutEdge => ({
    name,
    from,
    to,
    elementsPerToken,
    bytesPerToken: elementsPerToken * WIRE_BYTES,
  });
  return [
    edge('query', 'executor', 'shards', numHeads * headDim),
    edge('key', 'executor', 'one shard', numKvHeads * headDim),
    edge('value', 'executor', 'one shard', numKvHeads * headDim),
    edge('attention', 'shards', 'executor', numHeads * headDim),
    edge('hidden', 'executor', 'executor', hiddenSize),
  ];
}

function requireFormat(given: string = DEFAULT_WEIGHT_FORMAT): WeightFormat {
  const format = WEIGHT_FORMATS.find((each) => each === given);
  if (format !== undefined) return format;
  throw new LaminaError('config_invalid', `--weights "${given}" is none of: ${WEIGHT_FORMATS.join(', ')}`);
}
