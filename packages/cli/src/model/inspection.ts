/**
 * Owns what is known of a model without building or running it: stages, cut edges, KV, the interconnect it needs.
 *
 * Invariants
 * 1. Every unit stands in a name: this is what --json prints.
 */
import { type DecoderInspection, inspectDecoder, type WeightsChoice } from '@lamina/model';
import type { AttentionSpec } from '@lamina/tensor';
import { type Interconnect, interconnectOf, WIRE_BYTES } from './interconnect.ts';

export interface InspectOptions {
  readonly batch: number;
  readonly context?: number;
  readonly mtimeMs?: number;
  readonly atimeMs?: number;
  readonly alpha?: number;
}

/** The paper's, in its figure 4. */
const DEFAULT_ALPHA = 0.2;
const DEFAULT_CONTEXT = 1024;
const FLOAT32_BYTES = 4;

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
  /** `model_type` of its configuration; null if it names none. */
  readonly architecture: string | null;
  /** A checkpoint and how it is stored, or an ONNX decoder and which of its variants. */
  readonly form: DecoderInspection['form'];
  /** What products are computed with. */
  readonly activations: DecoderInspection['activations'];
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
  readonly weights: DecoderInspection['weights'];
  readonly interconnect: Interconnect;
}

export async function inspectModel(dir: string, choice: WeightsChoice, options: InspectOptions): Promise<Inspection> {
  const { description, architecture, form, activations, weights } = await inspectDecoder(dir, choice);
  const { attention, modelId, contextLength, vocabSize, hiddenSize, numStages } = description;
  const cutEdges = cutEdgesOf(attention, hiddenSize);
  const onWire = cutEdges.filter(({ name }) => name !== 'hidden');
  const kvElements = attention.numLayers * 2 * attention.numKvHeads * attention.headDim;
  return {
    modelId,
    dir: description.dir,
    architecture,
    form,
    activations,
    contextLength,
    vocabSize,
    hiddenSize,
    numStages,
    attention,
    cutEdges,
    wireBytesPerToken: attention.numLayers * onWire.reduce((sum, { bytesPerToken }) => sum + bytesPerToken, 0),
    kvBytesPerToken: { f16: kvElements * 2, f32: kvElements * 4 },
    weights,
    interconnect: interconnectOf({
      attention,
      batch: options.batch,
      context: options.context ?? Math.min(DEFAULT_CONTEXT, contextLength),
      parameters: weights.parameters,
      weightBytes: weights.bytes,
      alpha: { value: options.alpha ?? DEFAULT_ALPHA, origin: options.alpha === undefined ? 'paper' : 'given' },
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
    { ...edge('hidden', 'executor', 'executor', hiddenSize), bytesPerToken: hiddenSize * FLOAT32_BYTES },
  ];
}
