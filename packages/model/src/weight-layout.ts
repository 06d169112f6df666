/**
 * Owns which weights the graphs have, where each lies in the weights file, and what of the checkpoint it is made of.
 * The graphs and the weights file are both written from this one plan. Another weight format (int4, int8) is another
 * WeightSource and another operator in decoder-layers.ts.
 *
 * Invariants
 * 1. Offsets follow from the configuration alone and are aligned for memory mapping; no two weights overlap.
 * 2. Matrices lie as [K, N] (input, output features), ready for MatMul; the embedding lies as [vocab, hidden], ready
 *    for Gather, and a tied LM head is that same range.
 */
import { architectureOf } from './architecture.ts';
import type { ModelConfig } from './model-config.ts';

/** One tensor of the checkpoint that is part of a weight. */
export interface SourceTensor {
  readonly name: string;
  readonly shape: readonly number[];
}

export type WeightSource =
  /** The checkpoint's tensors one after the other (first axis), as they lie. */
  | { readonly kind: 'rows'; readonly tensors: readonly SourceTensor[] }
  /** The checkpoint's [N_i, K] tensors, joined along N and transposed to [K, sum N_i]. */
  | { readonly kind: 'transposed'; readonly tensors: readonly SourceTensor[] }
  /** cos or sin of the rotary angles, [contextLength, headDim / 2]. */
  | { readonly kind: 'rotary'; readonly function: 'cos' | 'sin' };

/** A float32 tensor in the weights file. */
export interface Weight {
  readonly name: string;
  readonly dims: readonly number[];
  readonly source: WeightSource;
  readonly byteOffset: number;
  readonly byteLength: number;
}

export interface LayerWeights {
  readonly inputNorm: Weight;
  readonly postAttentionNorm: Weight;
  /** [hidden, (numHeads + 2 * numKvHeads) * headDim], columns Q, K, V. */
  readonly qkv: Weight;
  readonly qkvBias: Weight | null;
  /** [numHeads * headDim, hidden] */
  readonly output: Weight;
  readonly outputBias: Weight | null;
  /** [hidden, 2 * intermediate], columns gate, up. */
  readonly gateUp: Weight;
  readonly gateUpBias: Weight | null;
  /** [intermediate, hidden] */
  readonly down: Weight;
  readonly downBias: Weight | null;
}

export interface WeightLayout {
  /** [vocab, hidden] */
  readonly embedding: Weight;
  /** [vocab, hidden]; the embedding itself if tied. */
  readonly head: Weight;
  readonly finalNorm: Weight;
  readonly cos: Weight;
  readonly sin: Weight;
  readonly layers: readonly LayerWeights[];
  /** Every weight once, in the order of the file. */
  readonly all: readonly Weight[];
  readonly totalBytes: number;
}

/** A page, so that ONNX Runtime maps the file instead of copying it. */
const ALIGNMENT_BYTES = 4096;

export function layOutWeights(config: ModelConfig): WeightLayout {
  const architecture = architectureOf(config.modelType);
  if (architecture === undefined) throw new TypeError(`no architecture facts for ${config.modelType}`);
  const { hiddenSize, intermediateSize, vocabSize, headDim } = config;
  const queryWidth = config.numHeads * headDim;
  const kvWidth = config.numKvHeads * headDim;
  const all: Weight[] = [];
  let end = 0;

  function place(name: string, dims: readonly number[], source: WeightSource): Weight {
    const byteOffset = Math.ceil(end / ALIGNMENT_BYTES) * ALIGNMENT_BYTES;
    const byteLength = dims.reduce((a, b) => a * b, 4);
    const weight = { name, dims, source, byteOffset, byteLength };
    all.push(weight);
    end = byteOffset + byteLength;
    return weight;
  }
  const table = (name: string, dims: readonly number[]): Weight =>
    place(name, dims, { kind: 'rows', tensors: [{ name: `${name}.weight`, shape: dims }] });
  const matrix = (name: string, inputs: number, parts: readonly (readonly [string, number])[]): Weight =>
    place(`${name}.weight`, [inputs, widthOf(parts)], {
      kind: 'transposed',
      tensors: parts.map(([part, outputs]) => ({ name: `${part}.weight`, shape: [outputs, inputs] })),
    });
  const bias = (name: string, present: boolean, parts: readonly (readonly [string, number])[]): Weight | null =>
    present
      ? place(`${name}.bias`, [widthOf(parts)], {
          kind: 'rows',
          tensors: parts.map(([part, outputs]) => ({ name: `${part}.bias`, shape: [outputs] })),
        })
      : null;

  const embedding = table(architecture.embedding, [vocabSize, hiddenSize]);
  const cos = place('rotary.cos', [config.contextLength, headDim / 2], { kind: 'rotary', function: 'cos' });
  const sin = place('rotary.sin', [config.contextLength, headDim / 2], { kind: 'rotary', function: 'sin' });
  const layers: LayerWeights[] = [];
  for (let layer = 0; layer < config.numLayers; layer++) {
    const names = architecture.layer(layer);
    const qkvParts = [
      [names.query, queryWidth],
      [names.key, kvWidth],
      [names.value, kvWidth],
    ] as const;
    const gateUpParts = [
      [names.gate, intermediateSize],
      [names.up, intermediateSize],
    ] as const;
    const outputParts = [[names.output, hiddenSize]] as const;
    const downParts = [[names.down, hiddenSize]] as const;
    layers.push({
      inputNorm: table(names.inputNorm, [hiddenSize]),
      qkv: matrix(`layers.${layer}.qkv`, hiddenSize, qkvParts),
      qkvBias: bias(`layers.${layer}.qkv`, config.attentionBias, qkvParts),
      output: matrix(`layers.${layer}.output`, queryWidth, outputParts),
      outputBias: bias(`layers.${layer}.output`, config.attentionBias, outputParts),
      postAttentionNorm: table(names.postAttentionNorm, [hiddenSize]),
      gateUp: matrix(`layers.${layer}.gate_up`, hiddenSize, gateUpParts),
      gateUpBias: bias(`layers.${layer}.gate_up`, config.mlpBias, gateUpParts),
      down: matrix(`layers.${layer}.down`, intermediateSize, downParts),
      downBias: bias(`layers.${layer}.down`, config.mlpBias, downParts),
    });
  }
  const finalNorm = table(architecture.finalNorm, [hiddenSize]);
  const head = config.tieWordEmbeddings ? embedding : table(architecture.head, [vocabSize, hiddenSize]);
  return { embedding, head, finalNorm, cos, sin, layers, all, totalBytes: end };
}

function widthOf(parts: readonly (readonly [string, number])[]): number {
  return parts.reduce((sum, [, outputs]) => sum + outputs, 0);
}
