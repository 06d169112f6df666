/**
 * Owns which weights the graphs have, where each lies in the weights file, and what of the checkpoint it is made of.
 * The graphs and the weights file are both written from this one plan. How a weight is stored (float32, quantized, in
 * place) is weight-storage.ts, how it is then used linear.ts; neither is known here.
 *
 * Invariants
 * 1. Matrices are [K, N] (input, output features); the embedding is [vocab, hidden], and a tied LM head is the
 *    embedding.
 */
import { type Architecture, architectureOf, type TensorRoot } from './architecture.ts';
import type { ModelConfig } from './model-config.ts';
import { numRotaryRows } from './rotary.ts';
import type { Checkpoint } from './safetensors.ts';
import type { Weight, WeightSource } from './weight.ts';
import { type StorageOptions, WeightPlacer } from './weight-storage.ts';

/** Norms before Architecture.normOffset is added; beta only where the norm has one. */
export interface NormWeights {
  readonly gamma: Weight;
  readonly beta: Weight | null;
}

/** A norm that is null is left out. */
export interface LayerWeights {
  readonly inputNorm: NormWeights | null;
  /** [hidden, (numHeads + 2 * numKvHeads) * headDim], columns Q, K, V. */
  readonly qkv: Weight;
  readonly qkvBias: Weight | null;
  /** [headDim] for every head, or [width] for the whole projection. */
  readonly queryNorm: NormWeights | null;
  readonly keyNorm: NormWeights | null;
  /** [numHeads * headDim, hidden] */
  readonly output: Weight;
  readonly outputBias: Weight | null;
  readonly attentionOutputNorm: NormWeights | null;
  readonly mlpInputNorm: NormWeights | null;
  /** [hidden, 2 * intermediate], columns gate, up; [hidden, intermediate] where there is no gate. */
  readonly gateUp: Weight;
  readonly gateUpBias: Weight | null;
  /** [intermediate, hidden] */
  readonly down: Weight;
  readonly downBias: Weight | null;
  readonly mlpOutputNorm: NormWeights | null;
}

export interface RotaryWeights {
  readonly cos: Weight;
  readonly sin: Weight;
}

export interface WeightLayout {
  /** [vocab, hidden] */
  readonly embedding: Weight;
  /** [contextLength, hidden], added to the embedding; null: rotary embedding. */
  readonly positions: Weight | null;
  /** [vocab, hidden]; the embedding itself if tied. */
  readonly head: Weight;
  readonly finalNorm: NormWeights;
  /** As ModelConfig.rotaryTables. */
  readonly rotary: readonly RotaryWeights[];
  readonly layers: readonly LayerWeights[];
  /** Every weight once, in the order of the file. */
  readonly all: readonly Weight[];
  readonly totalBytes: number;
}

export function layOutWeights(config: ModelConfig, options: StorageOptions): WeightLayout {
  const architecture = architectureOf(config.modelType);
  if (architecture === undefined) throw new TypeError(`no architecture facts for ${config.modelType}`);
  const { hiddenSize, intermediateSize, vocabSize, headDim, contextLength } = config;
  const queryWidth = config.numHeads * headDim;
  const kvWidth = config.numKvHeads * headDim;
  const root = rootOf(architecture, options.checkpoint);
  const placer = new WeightPlacer(options);
  const place = placer.place.bind(placer);
  const vector = (name: string, dims: readonly number[]): Weight =>
    place(name, dims, { kind: 'rows', tensors: [{ name: `${name}.weight`, shape: dims }] });
  const table = (name: string, dims: readonly number[]): Weight =>
    place(name, dims, { kind: 'rows', tensors: [{ name: `${name}.weight`, shape: dims }] }, 'table');
  const matrix = (name: string, inputs: number, parts: readonly Part[]): Weight =>
    place(`${name}.weight`, [inputs, widthOf(parts)], matrixSource(architecture, inputs, parts), 'matrix');
  const bias = (name: string, present: boolean, parts: readonly Part[]): Weight | null =>
    present
      ? place(`${name}.bias`, [widthOf(parts)], {
          kind: 'rows',
          tensors: parts.map(([part, outputs]) => ({ name: `${part}.bias`, shape: [outputs] })),
        })
      : null;

  const norm = (name: string, width: number): NormWeights => ({
    gamma: vector(name, [width]),
    beta:
      architecture.norm === 'layer'
        ? place(`${name}.bias`, [width], { kind: 'rows', tensors: [{ name: `${name}.bias`, shape: [width] }] })
        : null,
  });

  const embedding = table(root.body + architecture.embedding, [vocabSize, hiddenSize]);
  const positions =
    architecture.positions === null ? null : vector(root.body + architecture.positions, [contextLength, hiddenSize]);
  const rotary = config.rotaryTables.map((rotaryTable, i): RotaryWeights => {
    const dims = [numRotaryRows(rotaryTable, contextLength), rotaryTable.dim / 2];
    const source = { kind: 'rotary', table: rotaryTable, contextLength } as const;
    return {
      cos: place(`rotary.${i}.cos`, dims, { ...source, function: 'cos' }),
      sin: place(`rotary.${i}.sin`, dims, { ...source, function: 'sin' }),
    };
  });
  const isPerHead = architecture.queryKeyNorm === 'head';
  const layers: LayerWeights[] = [];
  for (let layer = 0; layer < config.numLayers; layer++) {
    const prefix = `${root.body}${architecture.layers}.${layer}.`;
    const names = architecture.layer;
    const normOf = (name: string | null, width: number): NormWeights | null =>
      name === null ? null : norm(prefix + name, width);
    const joined = (parts: readonly string[], widths: readonly number[]): Part[] =>
      parts.length === 1
        ? [[prefix + parts[0], widths.reduce((a, b) => a + b, 0)]]
        : parts.map((part, i) => [prefix + part, widths[i] ?? 0]);
    const qkvParts = joined(names.qkv, [queryWidth, kvWidth, kvWidth]);
    const gateUpParts = joined(
      names.gateUp,
      architecture.isGated ? [intermediateSize, intermediateSize] : [intermediateSize],
    );
    const outputParts: Part[] = [[prefix + names.output, hiddenSize]];
    const downParts: Part[] = [[prefix + names.down, hiddenSize]];
    layers.push({
      inputNorm: normOf(names.inputNorm, hiddenSize),
      qkv: matrix(`layers.${layer}.qkv`, hiddenSize, qkvParts),
      qkvBias: bias(`layers.${layer}.qkv`, config.qkvBias, qkvParts),
      queryNorm: normOf(names.queryNorm, isPerHead ? headDim : queryWidth),
      keyNorm: normOf(names.keyNorm, isPerHead ? headDim : kvWidth),
      output: matrix(`layers.${layer}.output`, queryWidth, outputParts),
      outputBias: bias(`layers.${layer}.output`, config.outputBias, outputParts),
      attentionOutputNorm: normOf(names.attentionOutputNorm, hiddenSize),
      mlpInputNorm: normOf(names.mlpInputNorm, hiddenSize),
      gateUp: matrix(`layers.${layer}.gate_up`, hiddenSize, gateUpParts),
      gateUpBias: bias(`layers.${layer}.gate_up`, config.mlpBias, gateUpParts),
      down: matrix(`layers.${layer}.down`, intermediateSize, downParts),
      downBias: bias(`layers.${layer}.down`, config.mlpBias, downParts),
      mlpOutputNorm: normOf(names.mlpOutputNorm, hiddenSize),
    });
  }
  const finalNorm = norm(root.body + architecture.finalNorm, hiddenSize);
  const head = config.tieWordEmbeddings ? embedding : table(`${root.head}lm_head`, [vocabSize, hiddenSize]);
  const { weights: all, totalBytes } = placer;
  return { embedding, positions, head, finalNorm, rotary, layers, all, totalBytes };
}

/** A tensor of the checkpoint (without `.weight`) and its outputs. */
type Part = readonly [name: string, outputs: number];

/** Where this checkpoint has its tensors. */
export function rootOf(architecture: Architecture, checkpoint: Checkpoint): TensorRoot {
  const { roots, embedding } = architecture;
  const root = roots.find(({ body }) => checkpoint.has(`${body}${embedding}.weight`)) ?? roots[0];
  if (root === undefined) throw new TypeError('an architecture without a root');
  return root;
}

function matrixSource({ isInputMajor }: Architecture, inputs: number, parts: readonly Part[]): WeightSource {
  if (!isInputMajor) {
    const tensors = parts.map(([part, outputs]) => ({ name: `${part}.weight`, shape: [outputs, inputs] }));
    return { kind: 'transposed', tensors };
  }
  const [part, ...others] = parts;
  if (part === undefined || others.length > 0) throw new TypeError('input-major matrices cannot be joined');
  return { kind: 'rows', tensors: [{ name: `${part[0]}.weight`, shape: [inputs, part[1]] }] };
}

function widthOf(parts: readonly Part[]): number {
  return parts.reduce((sum, [, outputs]) => sum + outputs, 0);
}
