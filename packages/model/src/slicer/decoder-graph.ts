/**
 * Owns the graph that is being cut: nodes in topological order, who makes and who uses a value, initializers.
 *
 * Invariants
 * 1. Identity and Constant nodes are gone: an identity is its input under another name, a constant an initializer.
 * 2. A value has one maker: a node, an initializer or the graph's inputs.
 * 3. Nodes with subgraphs do not occur, but for two: If on a Boolean graph input (`use_cache_branch` of merged decoders)
 *    stands for the branch that reads the cache; If between constants is one of `choices`, without its subgraphs.
 */
import { modelInvalid } from '../model-error.ts';
import {
  integerOf,
  type OnnxAttribute,
  type OnnxGraph,
  type OnnxNode,
  type OnnxTensor,
  type OpsetImport,
} from '../onnx.ts';
import { bytesOfNumbers, TYPE } from './element-types.ts';
import { type PublishedFile, type PublishedTensor, publishedTensor } from './onnx-file.ts';

/** What to do about a graph that cannot be cut. */
export const SUPPORTED_FORMS =
  'use the checkpoint itself, or an export whose attention is GroupQueryAttention, MultiHeadAttention or Attention, or products and a softmax over a cache that is joined by Concat (docs/models.md)';

export interface GraphNode {
  readonly name: string;
  readonly opType: string;
  /** Empty for ONNX's own operators. */
  readonly domain: string;
  /** An empty string stands for an input or output that is left out. */
  readonly inputs: string[];
  readonly outputs: string[];
  readonly attributes: ReadonlyMap<string, OnnxAttribute>;
}

export interface GraphInput {
  readonly name: string;
  readonly dataType: number;
  readonly dims: readonly (number | string)[];
}

/** An If between tables: what its outputs are if its condition holds, and if not. */
interface TableChoice {
  readonly node: GraphNode;
  readonly thenTables: readonly string[];
  readonly elseTables: readonly string[];
}

export class DecoderGraph {
  readonly path: string;
  readonly irVersion: number;
  readonly opsetImports: readonly OpsetImport[];
  nodes: GraphNode[] = [];
  readonly inputs: readonly GraphInput[];
  readonly outputs: readonly string[];
  readonly initializers: Map<string, PublishedTensor>;
  readonly choices: TableChoice[] = [];
  readonly #aliases = new Map<string, string>();
  #makers: Map<string, GraphNode> | undefined;
  #users: Map<string, GraphNode[]> | undefined;
  #numFresh = 0;

  constructor(file: PublishedFile) {
    this.path = file.path;
    this.irVersion = file.irVersion;
    this.opsetImports = file.opsetImports;
    this.initializers = new Map(file.initializers);
    this.inputs = (file.graph.input ?? []).flatMap((input) => {
      const tensor = input.type?.tensorType;
      const dims = (tensor?.shape?.dim ?? []).map((dim) => dim.dimParam || integerOf(dim.dimValue));
      return this.initializers.has(input.name ?? '')
        ? []
        : [{ name: input.name ?? '', dataType: tensor?.elemType ?? 0, dims }];
    });
    this.#addAll(file.graph);
    this.outputs = (file.graph.output ?? []).map((output) => this.resolved(output.name ?? ''));
  }

  /** The version of a domain's operators; 0 if the graph does not import it. */
  opset(domain: string): number {
    const isMain = (name: string): boolean => name === '' || name === 'ai.onnx';
    const found = this.opsetImports.find((entry) => entry.domain === domain || (domain === '' && isMain(entry.domain)));
    return found?.version ?? 0;
  }

  /** The name under which a value of the file is known here. */
  resolved(name: string): string {
    return this.#aliases.get(name) ?? name;
  }

  maker(value: string): GraphNode | undefined {
    this.#makers ??= new Map(this.nodes.flatMap((node) => node.outputs.map((output) => [output, node] as const)));
    return this.#makers.get(value);
  }

  users(value: string): readonly GraphNode[] {
    if (this.#users === undefined) {
      this.#users = new Map();
      for (const node of this.nodes) {
        for (const input of new Set(node.inputs)) {
          const list = this.#users.get(input);
          if (list === undefined) this.#users.set(input, [node]);
          else list.push(node);
        }
      }
    }
    return this.#users.get(value) ?? [];
  }

  input(name: string): GraphInput | undefined {
    return this.inputs.find((input) => input.name === name);
  }

  fresh(label: string): string {
    return `lamina.${label}.${this.#numFresh++}`;
  }

  /** A new initializer of integers or floats; no dims = a vector. */
  constant(
    label: string,
    dataType: number,
    values: ArrayLike<number>,
    dims: readonly number[] = [values.length],
  ): string {
    const name = this.fresh(label);
    this.initializers.set(name, { name, dataType, dims, source: bytesOfNumbers(dataType, values) });
    return name;
  }

  /** Puts nodes in the place of one; the new ones are in topological order. */
  replace(node: GraphNode, replacements: readonly GraphNode[]): void {
    const at = this.nodes.indexOf(node);
    this.nodes.splice(at, 1, ...replacements);
    this.#makers = undefined;
    this.#users = undefined;
  }

  refuse(node: GraphNode | undefined, problem: string, remedy: string): Error {
    const operator = node === undefined ? '' : `${describe(node)}: `;
    return modelInvalid(this.path, `${operator}${problem}`, remedy);
  }

  #addAll(graph: OnnxGraph): void {
    for (const proto of graph.initializer ?? []) this.#addTensor(proto.name ?? '', proto);
    for (const proto of graph.node ?? []) this.#add(proto);
  }

  #addTensor(name: string, proto: OnnxTensor): void {
    this.initializers.set(name, { ...publishedTensor(this.path, proto), name });
  }

  #add(proto: OnnxNode): void {
    const node: GraphNode = {
      name: proto.name ?? '',
      opType: proto.opType ?? '',
      domain: proto.domain === 'ai.onnx' ? '' : (proto.domain ?? ''),
      inputs: (proto.input ?? []).map((name) => this.resolved(name)),
      outputs: [...(proto.output ?? [])],
      attributes: new Map((proto.attribute ?? []).map((attribute) => [attribute.name ?? '', attribute])),
    };
    const [output = ''] = node.outputs;
    if (node.opType === 'Identity' && node.domain === '') {
      this.#aliases.set(output, node.inputs[0] ?? '');
      return;
    }
    if (node.opType === 'Constant' && node.domain === '') {
      this.#addConstant(node, output);
      return;
    }
    const subgraphs = [...node.attributes.values()].filter(({ g }) => g !== null && g !== undefined);
    if (subgraphs.length === 0) {
      this.nodes.push(node);
      return;
    }
    const branch = node.attributes.get('then_branch')?.g;
    const otherwise = node.attributes.get('else_branch')?.g;
    if (node.opType !== 'If' || !branch || !otherwise) {
      throw this.refuse(node, 'has a subgraph, which is not supported', 'export the decoder without control flow');
    }
    if (this.input(node.inputs[0] ?? '') === undefined) {
      this.#addChoice(node, branch, otherwise);
      return;
    }
    const outputs = this.#addBranch(branch);
    for (const [i, output] of outputs.entries()) this.#aliases.set(node.outputs[i] ?? '', output);
  }

  /** Adds what a branch makes, and returns the names of its outputs here. */
  #addBranch(branch: OnnxGraph): string[] {
    this.#addAll(branch);
    return (branch.output ?? []).map(({ name }) => this.resolved(name ?? ''));
  }

  #addChoice(node: GraphNode, branch: OnnxGraph, otherwise: OnnxGraph): void {
    for (const inner of [...(branch.node ?? []), ...(otherwise.node ?? [])]) {
      if (inner.opType === 'Constant' || inner.opType === 'Identity') continue;
      const problem = `computes in its branches (${inner.opType} '${inner.name}'); only a choice of tables is supported`;
      throw this.refuse(node, problem, 'export the decoder without control flow');
    }
    const plain = { ...node, attributes: new Map<string, OnnxAttribute>() };
    this.nodes.push(plain);
    const [thenTables, elseTables] = [this.#addBranch(branch), this.#addBranch(otherwise)];
    this.choices.push({ node: plain, thenTables, elseTables });
  }

  #addConstant(node: GraphNode, name: string): void {
    const [attribute] = node.attributes.values();
    const set = (dataType: number, values: readonly number[], dims: readonly number[]): void => {
      this.initializers.set(name, { name, dataType, dims, source: bytesOfNumbers(dataType, values) });
    };
    if (attribute?.name === 'value' && attribute.t) this.#addTensor(name, attribute.t);
    else if (attribute?.name === 'value_int') set(TYPE.int64, [integerOf(attribute.i)], []);
    else if (attribute?.name === 'value_float') set(TYPE.float, [attribute.f ?? 0], []);
    else if (attribute?.name === 'value_ints') {
      const values = (attribute.ints ?? []).map(integerOf);
      set(TYPE.int64, values, [values.length]);
    } else if (attribute?.name === 'value_floats')
      set(TYPE.float, attribute.floats ?? [], [attribute.floats?.length ?? 0]);
    else throw this.refuse(node, 'is a constant of a kind that is not supported', 'use another variant');
  }
}

function describe(node: GraphNode): string {
  const domain = node.domain === '' ? '' : `${node.domain}.`;
  return `node '${node.name === '' ? (node.outputs[0] ?? '') : node.name}' (${domain}${node.opType})`;
}

export function integerAttribute(node: GraphNode, name: string, otherwise: number): number {
  const attribute = node.attributes.get(name);
  return attribute === undefined ? otherwise : integerOf(attribute.i);
}

export function floatAttribute(node: GraphNode, name: string, otherwise: number): number {
  return node.attributes.get(name)?.f ?? otherwise;
}

/** A list of integers, or undefined if the attribute is not there. */
export function integersAttribute(node: GraphNode, name: string): number[] | undefined {
  return node.attributes.get(name)?.ints?.map(integerOf);
}

export function stringAttribute(node: GraphNode, name: string): string {
  const bytes = node.attributes.get(name)?.s;
  return bytes === null || bytes === undefined ? '' : new TextDecoder().decode(bytes);
}

/** A node made here: attributes are integers, or { float }, or { ints }. */
export function newNode(
  opType: string,
  inputs: readonly string[],
  outputs: readonly string[],
  attributes: Readonly<Record<string, number | { readonly float: number } | { readonly ints: readonly number[] }>> = {},
  domain = '',
): GraphNode {
  const entries = Object.entries(attributes).map(([name, value]): [string, OnnxAttribute] => {
    if (typeof value === 'number') return [name, { name, type: ATTRIBUTE.int, i: value }];
    if ('float' in value) return [name, { name, type: ATTRIBUTE.float, f: value.float }];
    return [name, { name, type: ATTRIBUTE.ints, ints: [...value.ints] }];
  });
  const name = `${opType}:${outputs.find((output) => output !== '') ?? ''}`;
  return { name, opType, domain, inputs: [...inputs], outputs: [...outputs], attributes: new Map(entries) };
}

/** AttributeProto.AttributeType. */
const ATTRIBUTE = { float: 1, int: 2, ints: 7 } as const;
