/**
 * Owns what each stage of a published decoder weighs, and how exactly its graph computes: from the graph alone.
 *
 * Invariants
 * 1. A stage is charged with every tensor of the published graph that its part of the staged graph has, in the bytes of
 *    the published file. Tables that all stages share are charged to the first.
 * 2. Parameters are counted as before quantization: two to a byte of 4-bit weights, none for scales and zero points.
 */
import { integerOf, type OnnxGraph, type OnnxNode, type OnnxTensor } from './onnx.ts';
import { integerAttribute } from './slicer/decoder-graph.ts';
import { isFloating, TYPE } from './slicer/element-types.ts';
import type { PublishedTensor } from './slicer/onnx-file.ts';
import type { SlicedDecoder } from './slicer/slice-decoder.ts';
import type { Activations, ModelWeights, StageWeights } from './stage-weights.ts';

type Source = PublishedTensor['source'];

/** Inputs that are no parameters by themselves: scales, zero points, rotary tables. */
const SIDE_INPUTS: Readonly<Record<string, readonly number[]>> = {
  MatMulNBits: [2, 3, 4],
  MatMulBnb4: [2],
  GatherBlockQuantized: [2, 3],
  DequantizeLinear: [1, 2],
  QuantizeLinear: [1, 2],
  MatMulInteger: [2, 3],
  DynamicQuantizeMatMul: [2, 3],
  RotaryEmbedding: [1, 2, 3],
};
const DYNAMIC_QUANTIZATION = new Set(['DynamicQuantizeLinear', 'DynamicQuantizeMatMul', 'DynamicQuantizeLSTM']);
/** MatMulNBits: activations are rounded to 8 bits. */
const ACCURACY_LEVEL_INT8 = 4;

/** Distinct tensors: by where their data is, which a tensor under another name keeps. */
type Weighed = Map<Source, number>;

export function publishedStageWeights({ graph, stagedGraph }: SlicedDecoder): ModelWeights {
  const published = new Set([...graph.initializers.values()].map(({ source }) => source));
  const placed = new Map<OnnxTensor, PublishedTensor>();
  const staged = stagedGraph((tensor, name) => {
    const proto: OnnxTensor = { name };
    if (published.has(tensor.source)) placed.set(proto, tensor);
    return proto;
  });
  const tables: Weighed = new Map();
  for (const proto of staged.initializer ?? []) {
    const tensor = placed.get(proto);
    if (tensor !== undefined) tables.set(tensor.source, 0);
  }
  const weighed = leavesOf(staged).map((leaf) => weigh(leaf, placed));
  const all: Weighed = new Map(tables);
  for (const stage of weighed) {
    for (const [source, parameters] of stage) all.set(source, Math.max(parameters, all.get(source) ?? 0));
  }
  const stages = weighed.map((own, stage): StageWeights => {
    const charged = stage === 0 ? new Map([...tables, ...own]) : own;
    return { stage, ...totalOf(charged) };
  });
  return { stages, ...totalOf(all) };
}

/** How the published graph rounds what it computes with. */
export function publishedActivations({ graph }: SlicedDecoder): Activations {
  const isInt8 = graph.nodes.some(
    (node) =>
      DYNAMIC_QUANTIZATION.has(node.opType) || integerAttribute(node, 'accuracy_level', 0) === ACCURACY_LEVEL_INT8,
  );
  if (isInt8) return 'int8';
  const half: readonly number[] = [TYPE.float16, TYPE.bfloat16];
  const isHalf = [...graph.initializers.values()].some(({ dataType }) => half.includes(dataType));
  return isHalf ? 'float16' : 'float32';
}

/** The stages' graphs, in their order: the branches of the tree of If nodes. */
function leavesOf(graph: OnnxGraph): OnnxGraph[] {
  const choice = (graph.node ?? []).find(({ name }) => name?.startsWith('If:stages_'));
  if (choice === undefined) return [graph];
  return ['then_branch', 'else_branch'].flatMap((branch) => {
    const subgraph = choice.attribute?.find(({ name }) => name === branch)?.g;
    return subgraph ? leavesOf(subgraph) : [];
  });
}

function weigh(leaf: OnnxGraph, placed: ReadonlyMap<OnnxTensor, PublishedTensor>): Weighed {
  const tensors = new Map(
    (leaf.initializer ?? []).flatMap((proto) => {
      const tensor = placed.get(proto);
      return tensor === undefined ? [] : [[proto.name ?? '', tensor] as const];
    }),
  );
  const beside = sideValues(leaf);
  const weighed: Weighed = new Map();
  for (const node of leaf.node ?? []) {
    for (const [i, name] of (node.input ?? []).entries()) {
      const tensor = tensors.get(name);
      if (tensor === undefined) continue;
      const parameters = beside.has(name) ? 0 : parametersOf(node, i, tensor);
      weighed.set(tensor.source, Math.max(parameters, weighed.get(tensor.source) ?? 0));
    }
  }
  return weighed;
}

/** Values that are side inputs, as they are or cast. */
function sideValues(leaf: OnnxGraph): ReadonlySet<string> {
  const values = new Set<string>();
  for (const { opType, input, output } of [...(leaf.node ?? [])].reverse()) {
    const isCastOfSide = opType === 'Cast' && values.has(output?.[0] ?? '');
    const indices = isCastOfSide ? [0] : (SIDE_INPUTS[opType ?? ''] ?? []);
    for (const i of indices) values.add(input?.[i] ?? '');
  }
  return values;
}

function parametersOf(node: OnnxNode, input: number, { dataType, dims }: PublishedTensor): number {
  const opType = node.opType ?? '';
  const integer = (name: string): number => integerOf(node.attribute?.find((each) => each.name === name)?.i ?? 0);
  if ((opType === 'MatMulNBits' || opType === 'MatMulBnb4') && input === 1) return integer('K') * integer('N');
  const elements = dims.reduce((a, b) => a * b, 1);
  if (opType === 'GatherBlockQuantized' && input === 0) {
    return dataType === TYPE.uint8 ? elements * (8 / (integer('bits') || 4)) : elements;
  }
  // One element is a constant; integers of more than 8 bits are shapes and indices.
  const isWeight = isFloating(dataType) || dataType === TYPE.int8 || dataType === TYPE.uint8;
  return isWeight && elements > 1 ? elements : 0;
}

function totalOf(weighed: Weighed): { parameters: number; bytes: number } {
  let [parameters, bytes] = [0, 0];
  for (const [source, own] of weighed) {
    parameters += own;
    bytes += source.byteLength;
  }
  return { parameters, bytes };
}
