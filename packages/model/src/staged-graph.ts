/**
 * Owns the staged dense graph and its contract: one graph, a binary tree of If nodes on `stage`, one leaf per stage.
 *
 *   stage 0      embedding; before-attention part of layer 0
 *   stage l      after-attention part of layer l - 1; before-attention part of layer l       (0 < l < numLayers)
 *   stage L      after-attention part of the last layer, final norm, LM head, of the rows `logit_rows` only
 *
 * Invariants
 * 1. Every leaf holds its weights inside its own branch, where ONNX Runtime packs them; cos and sin, which are never
 *    packed, are initializers of the outermost graph and shared by all leaves.
 * 2. All leaves have the same outputs in the same order; those that a stage does not compute have zero tokens (rows).
 * 3. Everything is token-wise: a wave is one flat list of tokens [1, T, ..] whatever requests they belong to.
 */
import { type Architecture, architectureOf } from './architecture.ts';
import {
  addAfterAttention,
  addEmbedding,
  addHead,
  addNormalization,
  addQkv,
  addRotary,
  type LayerContext,
} from './decoder-layers.ts';
import { GraphPiece } from './graph-piece.ts';
import type { ModelConfig } from './model-config.ts';
import { type ElementType, node, type OnnxGraph, type OnnxValueInfo, valueInfo } from './onnx.ts';
import type { WeightLayout } from './weight-layout.ts';

interface StagedValue {
  readonly name: string;
  readonly type: ElementType;
}

/** Inputs of the staged graph; T tokens of a wave, R of their rows whose logits are wanted. All must always be fed. */
export const STAGED_INPUTS = {
  /** [] : which stage to run, 0..numLayers. */
  stage: { name: 'stage', type: 'int64' },
  /** [1, T]: read by stage 0 only, [1, 0] for the others. */
  tokenIds: { name: 'token_ids', type: 'int64' },
  /**
   * [1, T]: position of each token in its request (of a short request plus ModelDescription.shortSequences.offset, if
   * there is one); read by all stages but the last.
   */
  positionIds: { name: 'position_ids', type: 'int64' },
  /** [1, T, hiddenSize]: `hidden_out` of the stage before; [1, 0, hiddenSize] for stage 0. */
  hidden: { name: 'hidden', type: 'float32' },
  /** [1, T, numHeads * headDim]: gathered attention of the layer before; [1, 0, ..] for stage 0. */
  attention: { name: 'attention', type: 'float32' },
  /** [R]: rows of T; read by the last stage only, [0] for the others. */
  logitRows: { name: 'logit_rows', type: 'int64' },
} as const satisfies Record<string, StagedValue>;

/** Outputs of the staged graph. */
export const STAGED_OUTPUTS = {
  /** [1, T, hiddenSize]: the residual stream, to be handed to the next stage; [1, 0, ..] from the last stage. */
  hiddenOut: { name: 'hidden_out', type: 'float32' },
  /** [1, T, numHeads * headDim] after rotary embedding; [1, 0, ..] from the last stage. */
  query: { name: 'query', type: 'float32' },
  /** [1, T, numKvHeads * headDim] after rotary embedding; [1, 0, ..] from the last stage. */
  key: { name: 'key', type: 'float32' },
  /** [1, T, numKvHeads * headDim]; [1, 0, ..] from the last stage. */
  value: { name: 'value', type: 'float32' },
  /** [R, vocabSize] from the last stage, [0, vocabSize] from the others. */
  logits: { name: 'logits', type: 'float32' },
} as const satisfies Record<string, StagedValue>;

const OUTPUT_NAMES = Object.values(STAGED_OUTPUTS).map(({ name }) => name);

export function buildStagedGraph(config: ModelConfig, layout: WeightLayout): OnnxGraph {
  const { stage, tokenIds, positionIds, hidden, attention, logitRows } = STAGED_INPUTS;
  const architecture = architectureOf(config.modelType);
  if (architecture === undefined) throw new TypeError(`no architecture facts for ${config.modelType}`);
  const tree = buildBranch({ config, architecture, layout }, 0, config.numLayers + 1);
  const shared = new GraphPiece();
  for (const { cos, sin } of layout.rotary) for (const table of [cos, sin]) shared.weight(table);
  const outputs = outputInfos(config, '');
  return {
    name: 'staged',
    // A root branch that is a leaf cannot be: there are at least two stages.
    node: (tree.node ?? []).map((treeNode) => ({ ...treeNode, output: renameOutputs(treeNode.output ?? [], tree) })),
    initializer: [...(tree.initializer ?? []), ...shared.initializers],
    input: [
      valueInfo(stage.name, stage.type, []),
      valueInfo(tokenIds.name, tokenIds.type, [1, 'embedded_tokens']),
      valueInfo(positionIds.name, positionIds.type, [1, 'positions']),
      valueInfo(hidden.name, hidden.type, [1, 'tokens', config.hiddenSize]),
      valueInfo(attention.name, attention.type, [1, 'tokens', config.numHeads * config.headDim]),
      valueInfo(logitRows.name, logitRows.type, ['logit_rows']),
    ],
    output: outputs,
  };
}

/** In the outermost graph the tree's outputs carry the public names. */
function renameOutputs(names: readonly string[], tree: OnnxGraph): string[] {
  const public_ = new Map((tree.output ?? []).map((output, i) => [output.name ?? '', OUTPUT_NAMES[i] ?? '']));
  return names.map((name) => public_.get(name) ?? name);
}

function outputInfos(config: ModelConfig, prefix: string): OnnxValueInfo[] {
  const { hiddenOut, query, key, value, logits } = STAGED_OUTPUTS;
  const kvWidth = config.numKvHeads * config.headDim;
  return [
    valueInfo(prefix + hiddenOut.name, hiddenOut.type, [1, 'tokens_out', config.hiddenSize]),
    valueInfo(prefix + query.name, query.type, [1, 'tokens_out', config.numHeads * config.headDim]),
    valueInfo(prefix + key.name, key.type, [1, 'tokens_out', kvWidth]),
    valueInfo(prefix + value.name, value.type, [1, 'tokens_out', kvWidth]),
    valueInfo(prefix + logits.name, logits.type, ['logit_rows_out', config.vocabSize]),
  ];
}

interface Model {
  readonly config: ModelConfig;
  readonly architecture: Architecture;
  readonly layout: WeightLayout;
}

/** The graph that runs stages first..end - 1. */
function buildBranch(model: Model, first: number, end: number): OnnxGraph {
  if (end - first === 1) return buildLeaf(model, first);
  const middle = (first + end) >> 1;
  const prefix = `stages_${first}_${end}.`;
  const piece = new GraphPiece();
  const middleName = piece.integers(`${prefix}middle`, [middle], []);
  piece.add(
    node('Less', [STAGED_INPUTS.stage.name, middleName], [`${prefix}is_below`]),
    node(
      'If',
      [`${prefix}is_below`],
      OUTPUT_NAMES.map((name) => prefix + name),
      {
        then_branch: { graph: buildBranch(model, first, middle) },
        else_branch: { graph: buildBranch(model, middle, end) },
      },
    ),
  );
  return {
    name: `stages_${first}_${end}`,
    node: piece.nodes,
    initializer: piece.initializers,
    output: outputInfos(model.config, prefix),
  };
}

function buildLeaf({ config, architecture, layout }: Model, stage: number): OnnxGraph {
  const piece = new GraphPiece();
  const prefix = `stage_${stage}`;
  const context = { piece, config, architecture, prefix };
  if (stage < config.numLayers) addBeforeAttentionStage(context, layout, stage);
  else addLastStage(context, layout);
  return {
    name: prefix,
    node: piece.nodes,
    initializer: piece.initializers,
    output: outputInfos(config, `${prefix}.out.`),
  };
}

function outputName(context: LayerContext, output: StagedValue): string {
  return `${context.prefix}.out.${output.name}`;
}

function addBeforeAttentionStage(context: LayerContext, layout: WeightLayout, stage: number): void {
  const { piece, config } = context;
  const weights = layout.layers[stage];
  const previous = layout.layers[stage - 1];
  if (weights === undefined) throw new RangeError(`stage ${stage} has no layer`);
  const hiddenOut = outputName(context, STAGED_OUTPUTS.hiddenOut);
  const positions = STAGED_INPUTS.positionIds.name;
  if (previous === undefined) {
    addEmbedding(piece, config, layout, STAGED_INPUTS.tokenIds.name, () => positions, hiddenOut);
  }
  const residual =
    previous === undefined
      ? { hidden: hiddenOut }
      : addAfterAttention(context, previous, STAGED_INPUTS.hidden.name, STAGED_INPUTS.attention.name);
  const { normalized } = addNormalization(context, 'input', residual, weights.inputNorm, hiddenOut);
  const { query, key, value } = STAGED_OUTPUTS;
  const outputs = {
    query: outputName(context, query),
    key: outputName(context, key),
    value: outputName(context, value),
  };
  const tableIndex = config.rotaryOfLayer[stage] ?? null;
  const table = tableIndex === null ? undefined : config.rotaryTables[tableIndex];
  const rotary = tableIndex === null ? undefined : layout.rotary[tableIndex];
  if (table === undefined || rotary === undefined) {
    addQkv(context, weights, normalized, outputs);
  } else {
    const plain = { ...outputs, query: `${context.prefix}.query`, key: `${context.prefix}.key` };
    addQkv(context, weights, normalized, plain);
    const tables = { dim: table.dim, positions, cos: rotary.cos.name, sin: rotary.sin.name };
    addRotary(context, plain.query, outputs.query, config.numHeads, tables);
    addRotary(context, plain.key, outputs.key, config.numKvHeads, tables);
  }
  addEmpty(context, STAGED_OUTPUTS.logits, [0, config.vocabSize]);
}

/** The wanted rows are gathered first, so that the whole last half layer runs on them only. */
function addLastStage(context: LayerContext, layout: WeightLayout): void {
  const { piece, config, prefix } = context;
  const weights = layout.layers.at(-1);
  if (weights === undefined) throw new RangeError('a model without layers');
  const { hidden, attention, logitRows } = STAGED_INPUTS;
  const [hiddenRows, attentionRows] = [`${prefix}.hidden_rows`, `${prefix}.attention_rows`];
  piece.add(node('Gather', [hidden.name, logitRows.name], [hiddenRows], { axis: 1 }));
  piece.add(node('Gather', [attention.name, logitRows.name], [attentionRows], { axis: 1 }));
  const residual = addAfterAttention(context, weights, hiddenRows, attentionRows);
  addHead(context, layout, residual, outputName(context, STAGED_OUTPUTS.logits));
  const kvWidth = config.numKvHeads * config.headDim;
  addEmpty(context, STAGED_OUTPUTS.hiddenOut, [1, 0, config.hiddenSize]);
  addEmpty(context, STAGED_OUTPUTS.query, [1, 0, config.numHeads * config.headDim]);
  addEmpty(context, STAGED_OUTPUTS.key, [1, 0, kvWidth]);
  addEmpty(context, STAGED_OUTPUTS.value, [1, 0, kvWidth]);
}

/** An output that this stage does not compute. */
function addEmpty(context: LayerContext, output: StagedValue, dims: readonly number[]): void {
  const name = outputName(context, output);
  const shape = context.piece.integers(`${name}.shape`, dims);
  context.piece.add(node('ConstantOfShape', [shape], [name]));
}
