/**
 * Owns putting the stages of a published decoder together into one staged graph (the contract is staged-graph.ts's).
 *
 * Invariants
 * 1. Several values that are carried over one boundary lie side by side in `hidden`, padded with zeros to the widest
 *    boundary; a carried value of half precision is widened, which is exact.
 * 2. The last stage takes the wanted rows out of what it is given before it computes anything.
 */
import { modelInvalid } from '../model-error.ts';
import { MICROSOFT_DOMAIN, type OnnxGraph, type OnnxNode, type OnnxTensor, valueInfo } from '../onnx.ts';
import { STAGED_INPUTS, STAGED_OUTPUTS } from '../staged-graph.ts';
import { type DecoderGraph, type GraphNode, newNode } from './decoder-graph.ts';
import { TYPE } from './element-types.ts';
import { type EvaluatedRuns, LeafWriter, SharedTables } from './leaf-writer.ts';
import type { PublishedTensor } from './onnx-file.ts';
import { roleOf } from './samples.ts';
import type { StagePlan } from './stage-plan.ts';

export interface StagedShape {
  readonly hiddenSize: number;
  readonly queryWidth: number;
  readonly kvWidth: number;
  readonly vocabSize: number;
}

/** Turns a tensor of the published graph into one of the staged graph: where its data lies is not this file's. */
export type PlaceTensor = (tensor: PublishedTensor, name: string) => OnnxTensor;

const { stage: STAGE, tokenIds, positionIds, hidden, attention, logitRows } = STAGED_INPUTS;
const OUTPUTS = Object.values(STAGED_OUTPUTS);

interface WriterContext {
  readonly graph: DecoderGraph;
  readonly runs: EvaluatedRuns;
  readonly plan: StagePlan;
  readonly shape: StagedShape;
  readonly shared: SharedTables;
  readonly place: PlaceTensor;
}

export function writeStagedGraph(context: Omit<WriterContext, 'shared'>): OnnxGraph {
  const whole = { ...context, shared: new SharedTables() };
  const { shape } = context;
  const numStages = context.plan.sites.length + 1;
  const tree = writeBranch(whole, 0, numStages);
  const shared = [...whole.shared.initializers].map(([name, tensor]) => context.place(tensor, name));
  // The names of the tree's own outputs are those of the staged graph in the outermost graph.
  const publicNames = new Map((tree.output ?? []).map((output, i) => [output.name ?? '', OUTPUTS[i]?.name ?? '']));
  const treeNodes = (tree.node ?? []).map((node) => ({
    ...node,
    output: (node.output ?? []).map((name) => publicNames.get(name) ?? name),
  }));
  return {
    name: 'staged',
    node: [...whole.shared.nodes.map(toProto), ...treeNodes],
    initializer: [...(tree.initializer ?? []), ...shared],
    input: [
      valueInfo(STAGE.name, STAGE.type, []),
      valueInfo(tokenIds.name, tokenIds.type, [1, 'embedded_tokens']),
      valueInfo(positionIds.name, positionIds.type, [1, 'positions']),
      valueInfo(hidden.name, hidden.type, [1, 'tokens', shape.hiddenSize]),
      valueInfo(attention.name, attention.type, [1, 'tokens', shape.queryWidth]),
      valueInfo(logitRows.name, logitRows.type, ['logit_rows']),
    ],
    output: outputInfos(shape, ''),
  };
}

function outputInfos(shape: StagedShape, prefix: string): ReturnType<typeof valueInfo>[] {
  const { hiddenOut, query, key, value, logits } = STAGED_OUTPUTS;
  const rows = (output: (typeof OUTPUTS)[number], width: number): ReturnType<typeof valueInfo> =>
    valueInfo(prefix + output.name, output.type, [1, 'tokens_out', width]);
  return [
    rows(hiddenOut, shape.hiddenSize),
    rows(query, shape.queryWidth),
    rows(key, shape.kvWidth),
    rows(value, shape.kvWidth),
    valueInfo(prefix + logits.name, logits.type, ['logit_rows_out', shape.vocabSize]),
  ];
}

/** The graph that runs stages first..end - 1. */
function writeBranch(context: WriterContext, first: number, end: number): OnnxGraph {
  if (end - first === 1) return writeLeaf(context, first);
  const middle = (first + end) >> 1;
  const prefix = `stages_${first}_${end}.`;
  const below = `${prefix}is_below`;
  const middleTensor = {
    name: `${prefix}middle`,
    dataType: TYPE.int64,
    dims: [],
    source: new Uint8Array(BigInt64Array.of(BigInt(middle)).buffer),
  };
  const choice: OnnxNode = {
    name: `If:${prefix}`,
    opType: 'If',
    domain: '',
    input: [below],
    output: OUTPUTS.map(({ name }) => prefix + name),
    attribute: [
      { name: 'then_branch', type: GRAPH_ATTRIBUTE, g: writeBranch(context, first, middle) },
      { name: 'else_branch', type: GRAPH_ATTRIBUTE, g: writeBranch(context, middle, end) },
    ],
  };
  return {
    name: `stages_${first}_${end}`,
    node: [toProto(newNode('Less', [STAGE.name, middleTensor.name], [below])), choice],
    initializer: [context.place(middleTensor, middleTensor.name)],
    output: outputInfos(context.shape, prefix),
  };
}

/** AttributeProto.AttributeType.GRAPH. */
const GRAPH_ATTRIBUTE = 5;

function writeLeaf(context: WriterContext, stage: number): OnnxGraph {
  const { graph, runs, plan, shape, shared } = context;
  const prefix = `stage_${stage}`;
  const isLast = stage === plan.sites.length;
  const tokensOf = stage === 0 ? tokenIds.name : isLast ? `${prefix}.attention_rows` : attention.name;
  const leaf = new LeafWriter(graph, runs, shared, prefix, tokensOf);
  const outputOf = (output: (typeof OUTPUTS)[number]): string => `${prefix}.out.${output.name}`;
  const { hiddenOut, query, key, value, logits } = STAGED_OUTPUTS;
  if (stage === 0) bindTokens(graph, leaf);
  else {
    const [carried, attended] = isLast
      ? [hidden.name, attention.name].map((name) => {
          const rows = name === attention.name ? tokensOf : `${prefix}.hidden_rows`;
          return leaf.add('Gather', [name, logitRows.name], { axis: 1 }, rows);
        })
      : [hidden.name, attention.name];
    bindCarried(context, leaf, stage, carried ?? '');
    leaf.bind(plan.sites[stage - 1]?.node.outputs[0] ?? '', attended ?? '');
  }
  const empty = (output: (typeof OUTPUTS)[number], dims: readonly number[]): void => {
    leaf.add('ConstantOfShape', [leaf.constant(dims)], {}, outputOf(output));
  };
  if (isLast) {
    const type = runs.evaluations[0]?.value(plan.logits).dataType ?? TYPE.float;
    const rows = leaf.add('Reshape', [leaf.emit(plan.logits), leaf.constant([-1, shape.vocabSize])]);
    deliver(leaf, rows, type, outputOf(logits));
    empty(hiddenOut, [1, 0, shape.hiddenSize]);
    empty(query, [1, 0, shape.queryWidth]);
    empty(key, [1, 0, shape.kvWidth]);
    empty(value, [1, 0, shape.kvWidth]);
  } else {
    const site = plan.sites[stage];
    for (const [i, output] of [query, key, value].entries()) {
      leaf.add('Identity', [leaf.emit(site?.node.inputs[i] ?? '')], {}, outputOf(output));
    }
    carry(context, leaf, stage, outputOf(hiddenOut));
    empty(logits, [0, shape.vocabSize]);
  }
  return {
    name: prefix,
    node: leaf.nodes.map(toProto),
    initializer: [...leaf.initializers].map(([name, tensor]) => context.place(tensor, name)),
    output: outputInfos(shape, `${prefix}.out.`),
  };
}

function bindTokens(graph: DecoderGraph, leaf: LeafWriter): void {
  for (const input of graph.inputs) {
    if (roleOf(graph, input) !== 'tokenIds') continue;
    const name =
      input.dataType === TYPE.int64 ? tokenIds.name : leaf.add('Cast', [tokenIds.name], { to: input.dataType });
    leaf.bind(input.name, name);
  }
}

function deliver(leaf: LeafWriter, name: string, dataType: number, output: string): void {
  if (dataType === TYPE.float) leaf.add('Identity', [name], {}, output);
  else leaf.add('Cast', [name], { to: TYPE.float }, output);
}

/** Writes what stage `stage` hands on into its `hidden_out`. */
function carry({ plan, runs, shape }: WriterContext, leaf: LeafWriter, stage: number, output: string): void {
  const names = plan.carried[stage] ?? [];
  const widths = plan.carriedWidths[stage] ?? [];
  const parts = names.map((name, i) => {
    const { dataType, dims } = runs.evaluations[0]?.value(name) ?? { dataType: TYPE.float, dims: [] };
    const here = leaf.emit(name);
    const rows = dims.length === 3 ? here : leaf.add('Reshape', [here, leaf.constant([1, -1, widths[i] ?? 0])]);
    return dataType === TYPE.float ? rows : leaf.add('Cast', [rows], { to: TYPE.float });
  });
  const width = widths.reduce((a, b) => a + b, 0);
  const joined = parts.length === 1 ? (parts[0] ?? '') : leaf.add('Concat', parts, { axis: 2 });
  if (width === shape.hiddenSize) leaf.add('Identity', [joined], {}, output);
  else leaf.add('Pad', [joined, leaf.constant([0, 0, 0, 0, 0, shape.hiddenSize - width])], {}, output);
}

/** Takes what the stage before handed on apart again. */
function bindCarried({ plan, runs, shape }: WriterContext, leaf: LeafWriter, stage: number, from: string): void {
  const names = plan.carried[stage - 1] ?? [];
  const widths = plan.carriedWidths[stage - 1] ?? [];
  let start = 0;
  for (const [i, name] of names.entries()) {
    const width = widths[i] ?? 0;
    const { dataType, dims } = runs.evaluations[0]?.value(name) ?? { dataType: TYPE.float, dims: [] };
    const own =
      width === shape.hiddenSize
        ? from
        : leaf.add('Slice', [from, leaf.constant([start]), leaf.constant([start + width]), leaf.constant([2])]);
    const tokenAxis = dims.findIndex((dim) => dim !== 1);
    const isPlain = dims.length === 3 && tokenAxis === 1;
    const shaped = isPlain
      ? own
      : leaf.add('Reshape', [own, leaf.constant(dims.map((dim, axis) => (axis === tokenAxis ? -1 : dim)))]);
    leaf.bind(name, dataType === TYPE.float ? shaped : leaf.add('Cast', [shaped], { to: dataType }));
    start += width;
  }
}

function toProto(node: GraphNode): OnnxNode {
  if (node.domain === 'lamina') throw modelInvalid(node.name, 'an attention is left in a stage', 'report this');
  return {
    name: node.name,
    opType: node.opType,
    domain: node.domain,
    input: node.inputs,
    output: node.outputs,
    attribute: [...node.attributes.values()],
  };
}

/** Imports of the staged graph: those of the source, and Microsoft's, whose RotaryEmbedding may have been added. */
export function opsetImportsOf(graph: DecoderGraph): { domain: string; version: number }[] {
  const imports = graph.opsetImports.map(({ domain, version }) => ({ domain, version }));
  if (graph.opset(MICROSOFT_DOMAIN) === 0) imports.push({ domain: MICROSOFT_DOMAIN, version: 1 });
  return imports;
}
