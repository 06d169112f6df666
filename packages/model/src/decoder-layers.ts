/**
 * Owns the arithmetic of one decoder layer as ONNX nodes, cut at the attention: before it (norm, QKV, rotary) and
 * after it (output projection, norm, MLP). Staged and uncut graph are both put together from these pieces.
 *
 * Invariants
 * 1. Every piece brings its own initializers, so that they can be put inside the branch that uses them.
 * 2. Value names start with the piece's prefix; pieces of different prefixes can share one graph.
 * 3. Everything but attention is token-wise: no piece looks at the number of tokens or at which request they are of.
 */
import type { ModelConfig } from './model-config.ts';
import { int64Initializer, MICROSOFT_DOMAIN, node, type OnnxNode, type OnnxTensor, weightInitializer } from './onnx.ts';
import type { LayerWeights, Weight, WeightLayout } from './weight-layout.ts';

/** Nodes and initializers under construction. */
export class GraphPiece {
  readonly nodes: OnnxNode[] = [];
  readonly #initializers = new Map<string, OnnxTensor>();

  get initializers(): OnnxTensor[] {
    return [...this.#initializers.values()];
  }

  add(...nodes: readonly OnnxNode[]): void {
    this.nodes.push(...nodes);
  }

  /** Name of the weight, which becomes an initializer of this graph. */
  weight(weight: Weight): string {
    this.#initializers.set(weight.name, weightInitializer(weight));
    return weight.name;
  }

  /** Name of an integer constant; no dims given = a vector. */
  integers(name: string, values: readonly number[], dims: readonly number[] = [values.length]): string {
    this.#initializers.set(name, int64Initializer(name, values, dims));
    return name;
  }
}

/** A residual stream that is not added up yet: `hidden` + `delta` (+ bias). No delta: the embedding. */
export interface Residual {
  readonly hidden: string;
  readonly delta?: { readonly name: string; readonly bias: Weight | null };
}

export interface LayerContext {
  readonly piece: GraphPiece;
  readonly config: ModelConfig;
  /** Prefix of all value names. */
  readonly prefix: string;
}

/** Adds the residual up and normalizes it (RMS norm). Returns the names of the sum and of the normalized sum. */
export function addNormalization(
  { piece, config, prefix }: LayerContext,
  label: string,
  residual: Residual,
  gamma: Weight,
  sumName = `${prefix}.${label}.sum`,
): { sum: string; normalized: string } {
  const normalized = `${prefix}.${label}.normalized`;
  const epsilon = { float: config.rmsNormEps };
  const { hidden, delta } = residual;
  if (delta === undefined) {
    const attributes = { epsilon, axis: -1 };
    piece.add(node('SimplifiedLayerNormalization', [hidden, piece.weight(gamma)], [normalized], attributes));
    return { sum: hidden, normalized };
  }
  const inputs = [delta.name, hidden, piece.weight(gamma)];
  if (delta.bias !== null) inputs.push(piece.weight(delta.bias));
  const outputs = [normalized, '', '', sumName];
  piece.add(node('SkipSimplifiedLayerNormalization', inputs, outputs, { epsilon }, MICROSOFT_DOMAIN));
  return { sum: sumName, normalized };
}

/** Q, K and V of normalized hidden states, before rotary: [.., numHeads * headDim], 2 x [.., numKvHeads * headDim]. */
export function addQkv(
  context: LayerContext,
  weights: LayerWeights,
  normalized: string,
  valueName = `${context.prefix}.value`,
): { query: string; key: string; value: string } {
  const { config } = context;
  const kvWidth = config.numKvHeads * config.headDim;
  const joined = addLinear(context, 'qkv', normalized, weights.qkv, weights.qkvBias);
  const names = { query: `${context.prefix}.query`, key: `${context.prefix}.key`, value: valueName };
  const widths = [config.numHeads * config.headDim, kvWidth, kvWidth];
  addSplit(context, 'qkv', joined, widths, [names.query, names.key, names.value]);
  return names;
}

/** Rotary embedding (rotate half) of [1, T, numHeads * headDim] at explicit positions [1, T]. */
export function addRotary(
  { piece }: LayerContext,
  input: string,
  output: string,
  numHeads: number,
  tables: { readonly positions: string; readonly cos: string; readonly sin: string },
): void {
  const inputs = [input, tables.positions, tables.cos, tables.sin];
  piece.add(node('RotaryEmbedding', inputs, [output], { num_heads: numHeads, interleaved: 0 }, MICROSOFT_DOMAIN));
}

/** What follows attention: output projection, norm, MLP. The MLP's output is left as the residual's delta. */
export function addAfterAttention(
  context: LayerContext,
  weights: LayerWeights,
  hidden: string,
  attention: string,
): Residual {
  const { piece, config, prefix } = context;
  const projected = addLinear(context, 'output', attention, weights.output, null);
  const residual = { hidden, delta: { name: projected, bias: weights.outputBias } };
  const { sum, normalized } = addNormalization(context, 'post_attention', residual, weights.postAttentionNorm);
  const joined = addLinear(context, 'gate_up', normalized, weights.gateUp, weights.gateUpBias);
  const [gate, up] = [`${prefix}.gate`, `${prefix}.up`];
  addSplit(context, 'gate_up', joined, [config.intermediateSize, config.intermediateSize], [gate, up]);
  // QuickGelu with alpha 1 is SiLU: x * sigmoid(x).
  const [activated, gated] = [`${prefix}.activated`, `${prefix}.gated`];
  piece.add(node('QuickGelu', [gate], [activated], { alpha: { float: 1 } }, MICROSOFT_DOMAIN));
  piece.add(node('Mul', [activated, up], [gated]));
  const down = addLinear(context, 'down', gated, weights.down, null);
  return { hidden: sum, delta: { name: down, bias: weights.downBias } };
}

/** Embedding lookup: token ids [..] to [.., hidden]. */
export function addEmbedding(piece: GraphPiece, layout: WeightLayout, tokenIds: string, output: string): void {
  piece.add(node('Gather', [piece.weight(layout.embedding), tokenIds], [output]));
}

/** Final norm and LM head. `residual` is [.., hidden]; writes logits as rows, [rows, vocab], into `logits`. */
export function addHead(context: LayerContext, layout: WeightLayout, residual: Residual, logits: string): void {
  const { piece, config, prefix } = context;
  const { normalized } = addNormalization(context, 'final', residual, layout.finalNorm);
  const shape = piece.integers(`${prefix}.rows_shape`, [-1, config.hiddenSize]);
  piece.add(node('Reshape', [normalized, shape], [`${prefix}.rows`]));
  // The head lies as [vocab, hidden], so that a tied one is stored once; Gemm packs it transposed.
  piece.add(node('Gemm', [`${prefix}.rows`, piece.weight(layout.head)], [logits], { transB: 1 }));
}

function addLinear(
  { piece, prefix }: LayerContext,
  label: string,
  input: string,
  weight: Weight,
  bias: Weight | null,
): string {
  const output = `${prefix}.${label}`;
  const product = bias === null ? output : `${output}.product`;
  piece.add(node('MatMul', [input, piece.weight(weight)], [product]));
  if (bias !== null) piece.add(node('Add', [product, piece.weight(bias)], [output]));
  return output;
}

function addSplit(
  { piece, prefix }: LayerContext,
  label: string,
  input: string,
  widths: readonly number[],
  outputs: readonly string[],
): void {
  const sizes = piece.integers(`${prefix}.${label}.widths`, widths);
  piece.add(node('Split', [input, sizes], outputs, { axis: -1 }));
}
