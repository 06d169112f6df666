/**
 * Owns the arithmetic of one decoder layer as ONNX nodes, cut at the attention: before it (norm, QKV, rotary) and
 * after it (output projection, norm, MLP). Staged and uncut graph are both put together from these pieces.
 *
 * Invariants
 * 1. Every piece brings its own initializers, so that they can be put inside the branch that uses them.
 * 2. Value names start with the piece's prefix; pieces of different prefixes can share one graph.
 * 3. Everything but attention is token-wise: no piece looks at the number of tokens or at which request they are of.
 */
import type { Architecture } from './architecture.ts';
import type { GraphPiece } from './graph-piece.ts';
import { addLinear, addLookup, addSplitLinear, addTableProduct } from './linear.ts';
import type { Activation, ModelConfig } from './model-config.ts';
import { MICROSOFT_DOMAIN, node } from './onnx.ts';
import type { Weight } from './weight.ts';
import type { LayerWeights, NormWeights, WeightLayout } from './weight-layout.ts';

/** A residual stream that is not added up yet: `hidden` + `delta` (+ bias). No delta: the embedding. */
export interface Residual {
  readonly hidden: string;
  readonly delta?: { readonly name: string; readonly bias: Weight | null };
}

export interface LayerContext {
  readonly piece: GraphPiece;
  readonly config: ModelConfig;
  readonly architecture: Architecture;
  /** Prefix of all value names. */
  readonly prefix: string;
}

/** Names of Q, K and V: [.., numHeads * headDim], 2 x [.., numKvHeads * headDim]. */
export interface QkvNames {
  readonly query: string;
  readonly key: string;
  readonly value: string;
}

/** Adds the residual up and normalizes it; without a norm both are the sum. Returns the names of both. */
export function addNormalization(
  context: LayerContext,
  label: string,
  { hidden, delta }: Residual,
  norm: NormWeights | null,
  sumName = `${context.prefix}.${label}.sum`,
): { sum: string; normalized: string } {
  const { piece, config, architecture, prefix } = context;
  const normalized = `${prefix}.${label}.normalized`;
  if (delta === undefined) {
    return { sum: hidden, normalized: norm === null ? hidden : addNorm(context, hidden, norm, normalized) };
  }
  if (norm === null) {
    const summand = delta.bias === null ? delta.name : `${sumName}.biased`;
    if (delta.bias !== null) piece.add(node('Add', [delta.name, piece.weight(delta.bias)], [summand]));
    piece.add(node('Add', [summand, hidden], [sumName]));
    return { sum: sumName, normalized: sumName };
  }
  const inputs = [delta.name, hidden, addGamma(context, norm)];
  if (norm.beta !== null) inputs.push(piece.weight(norm.beta));
  if (delta.bias !== null) inputs.push(piece.weight(delta.bias));
  const opType = architecture.norm === 'rms' ? 'SkipSimplifiedLayerNormalization' : 'SkipLayerNormalization';
  const epsilon = { float: config.normEps };
  piece.add(node(opType, inputs, [normalized, '', '', sumName], { epsilon }, MICROSOFT_DOMAIN));
  return { sum: sumName, normalized };
}

/** Normalizes the last dimension. Returns `output`. */
function addNorm(context: LayerContext, input: string, norm: NormWeights, output: string): string {
  const { piece, config, architecture } = context;
  const inputs = [input, addGamma(context, norm)];
  if (norm.beta !== null) inputs.push(piece.weight(norm.beta));
  const opType = architecture.norm === 'rms' ? 'SimplifiedLayerNormalization' : 'LayerNormalization';
  piece.add(node(opType, inputs, [output], { epsilon: { float: config.normEps }, axis: -1 }));
  return output;
}

/** Gamma with its offset; the sum is of constants, so ONNX Runtime computes it once, when it loads the graph. */
function addGamma({ piece, architecture }: LayerContext, { gamma }: NormWeights): string {
  const name = piece.weight(gamma);
  if (architecture.normOffset === 0) return name;
  piece.add(node('Add', [name, piece.scalar('norm_offset', architecture.normOffset)], [`${name}.offset`]));
  return `${name}.offset`;
}

/** Q, K and V of normalized hidden states, before rotary embedding. */
export function addQkv(context: LayerContext, weights: LayerWeights, normalized: string, names: QkvNames): void {
  const { config } = context;
  const kvWidth = config.numKvHeads * config.headDim;
  const { queryNorm, keyNorm } = weights;
  const query = queryNorm === null ? names.query : `${names.query}.projected`;
  const key = keyNorm === null ? names.key : `${names.key}.projected`;
  addSplitLinear(context, 'qkv', normalized, weights.qkv, weights.qkvBias, [
    { name: query, width: config.numHeads * config.headDim },
    { name: key, width: kvWidth },
    { name: names.value, width: kvWidth },
  ]);
  if (queryNorm !== null) addHeadNorm(context, query, config.numHeads, queryNorm, names.query);
  if (keyNorm !== null) addHeadNorm(context, key, config.numKvHeads, keyNorm, names.key);
}

/** Normalizes Q or K [.., .., numHeads * headDim]: each head by itself, or the whole projection. */
function addHeadNorm(context: LayerContext, input: string, numHeads: number, norm: NormWeights, output: string): void {
  const { piece, config, architecture } = context;
  if (architecture.queryKeyNorm === 'projection') {
    addNorm(context, input, norm, output);
    return;
  }
  // 0: as in the input.
  const split = piece.integers(`${output}.heads_shape`, [0, 0, numHeads, config.headDim]);
  const joined = piece.integers(`${output}.shape`, [0, 0, numHeads * config.headDim]);
  piece.add(node('Reshape', [input, split], [`${output}.heads`]));
  addNorm(context, `${output}.heads`, norm, `${output}.normalized_heads`);
  piece.add(node('Reshape', [`${output}.normalized_heads`, joined], [output]));
}

/** Rotary embedding (rotate half) of [1, T, numHeads * headDim] at explicit positions [1, T]. */
export function addRotary(
  { piece, config }: LayerContext,
  input: string,
  output: string,
  numHeads: number,
  tables: { readonly dim: number; readonly positions: string; readonly cos: string; readonly sin: string },
): void {
  const inputs = [input, tables.positions, tables.cos, tables.sin];
  const partial = tables.dim === config.headDim ? {} : { rotary_embedding_dim: tables.dim };
  const attributes = { num_heads: numHeads, interleaved: 0, ...partial };
  piece.add(node('RotaryEmbedding', inputs, [output], attributes, MICROSOFT_DOMAIN));
}

/** What follows attention: output projection, norm, MLP. The MLP's output is left as the residual's delta. */
export function addAfterAttention(
  context: LayerContext,
  weights: LayerWeights,
  hidden: string,
  attention: string,
): Residual {
  const attended = addBranchEnd(context, 'output', attention, weights.output, weights.outputBias, {
    label: 'attention_output',
    norm: weights.attentionOutputNorm,
    isForeign: true,
  });
  const residual = { hidden, delta: attended };
  const { sum, normalized } = addNormalization(context, 'mlp_input', residual, weights.mlpInputNorm);
  const activated = addMlpActivation(context, weights, normalized);
  const delta = addBranchEnd(context, 'down', activated, weights.down, weights.downBias, {
    label: 'mlp_output',
    norm: weights.mlpOutputNorm,
    isForeign: false,
  });
  return { hidden: sum, delta };
}

/** The last matrix of a branch and the norm behind it, if there is one; without, the bias is left to the sum. */
function addBranchEnd(
  context: LayerContext,
  label: string,
  input: string,
  weight: Weight,
  bias: Weight | null,
  after: { readonly label: string; readonly norm: NormWeights | null; readonly isForeign: boolean },
): { name: string; bias: Weight | null } {
  if (after.norm === null) return { name: addLinear(context, label, input, weight, null, after.isForeign), bias };
  const product = addLinear(context, label, input, weight, bias, after.isForeign);
  const output = `${context.prefix}.${after.label}`;
  return { name: addNorm(context, product, after.norm, output), bias: null };
}

function addMlpActivation(context: LayerContext, weights: LayerWeights, input: string): string {
  const { piece, config, architecture, prefix } = context;
  const [gate, up, activated, gated] = [`${prefix}.gate`, `${prefix}.up`, `${prefix}.activated`, `${prefix}.gated`];
  if (!architecture.isGated) {
    const inner = addLinear(context, 'gate_up', input, weights.gateUp, weights.gateUpBias);
    return addActivation(piece, config.activation, inner, activated);
  }
  addSplitLinear(context, 'gate_up', input, weights.gateUp, weights.gateUpBias, [
    { name: gate, width: config.intermediateSize },
    { name: up, width: config.intermediateSize },
  ]);
  addActivation(piece, config.activation, gate, activated);
  piece.add(node('Mul', [activated, up], [gated]));
  return gated;
}

function addActivation(piece: GraphPiece, activation: Activation, input: string, output: string): string {
  // QuickGelu with alpha 1 is SiLU: x * sigmoid(x). FastGelu is the approximation with tanh.
  const alpha = { alpha: { float: 1 } };
  if (activation === 'silu') piece.add(node('QuickGelu', [input], [output], alpha, MICROSOFT_DOMAIN));
  else piece.add(node(activation === 'gelu' ? 'Gelu' : 'FastGelu', [input], [output], {}, MICROSOFT_DOMAIN));
  return output;
}

/** Embedding of token ids [..] at positions [..] (a value, asked for only if the model needs it): [.., hidden]. */
export function addEmbedding(
  piece: GraphPiece,
  config: ModelConfig,
  layout: WeightLayout,
  tokenIds: string,
  positions: () => string,
  output: string,
): void {
  const looked = `${output}.looked_up`;
  if (config.embeddingScale !== null) {
    addLookup(piece, layout.embedding, tokenIds, looked);
    piece.add(node('Mul', [looked, piece.scalar('embedding_scale', config.embeddingScale)], [output]));
  } else if (layout.positions !== null) {
    addLookup(piece, layout.embedding, tokenIds, looked);
    piece.add(node('Gather', [piece.weight(layout.positions), positions()], [`${output}.positions`]));
    piece.add(node('Add', [looked, `${output}.positions`], [output]));
  } else {
    addLookup(piece, layout.embedding, tokenIds, output);
  }
}

/** Final norm and LM head. `residual` is [.., hidden]; writes logits as rows, [rows, vocab], into `logits`. */
export function addHead(context: LayerContext, layout: WeightLayout, residual: Residual, logits: string): void {
  const { piece, config, prefix } = context;
  const { normalized } = addNormalization(context, 'final', residual, layout.finalNorm);
  const shape = piece.integers(`${prefix}.rows_shape`, [-1, config.hiddenSize]);
  piece.add(node('Reshape', [normalized, shape], [`${prefix}.rows`]));
  if (config.logitSoftcap === null) {
    addTableProduct(piece, layout.head, `${prefix}.rows`, logits);
    return;
  }
  const cap = piece.scalar(`${prefix}.softcap`, config.logitSoftcap);
  addTableProduct(piece, layout.head, `${prefix}.rows`, `${prefix}.uncapped`);
  piece.add(node('Div', [`${prefix}.uncapped`, cap], [`${prefix}.scaled`]));
  piece.add(node('Tanh', [`${prefix}.scaled`], [`${prefix}.squashed`]));
  piece.add(node('Mul', [`${prefix}.squashed`, cap], [logits]));
}
