/**
 * Owns what every attention becomes before the graph is cut: a site, with Q, K and V as plain rows of float32, and the
 * nodes around it that bring them into that form and its output back into the form of the graph.
 *
 * Invariants
 * 1. A site is the node `lamina.Attention` with inputs query [1, T, numHeads * headDim], key and value
 *    [1, T, numKvHeads * headDim] and output [1, T, numHeads * headDim]; nothing else of the attention remains.
 * 2. Added nodes exist in every opset from 11 on.
 */
import { type DecoderGraph, type GraphNode, newNode } from './decoder-graph.ts';
import { TYPE } from './element-types.ts';
import { sizeOf } from './values.ts';

export const SITE_DOMAIN = 'lamina';

export interface SiteFacts {
  readonly numHeads: number;
  readonly numKvHeads: number;
  readonly headDim: number;
  readonly scale: number;
  /** 0 = off. */
  readonly softcap: number;
  /** 0 = all. */
  readonly windowTokens: number;
  readonly alibiSlopes: readonly number[] | undefined;
  readonly sinkLogits: readonly number[] | undefined;
}

export interface AttentionSite {
  readonly node: GraphNode;
  /** The operator that it stands for, to be named in errors. */
  readonly origin: GraphNode;
  readonly facts: SiteFacts;
}

/** A value and how it lies: `tokens` = [1, T, width], `heads` = [1, heads, T, headDim] or without the 1. */
export interface Laid {
  readonly name: string;
  readonly dataType: number;
  readonly dims: readonly number[];
}

/** Collects the nodes that replace an attention operator. */
export class SiteBuilder {
  readonly nodes: GraphNode[] = [];
  readonly #graph: DecoderGraph;
  readonly #label: string;

  constructor(graph: DecoderGraph, origin: GraphNode) {
    this.#graph = graph;
    this.#label = origin.outputs[0] ?? origin.name;
  }

  /** Adds a node with one output and returns the output's name. */
  add(
    opType: string,
    inputs: readonly string[],
    attributes: Parameters<typeof newNode>[3] = {},
    domain = '',
    output = this.#graph.fresh(`${this.#label}.${opType}`),
  ): string {
    this.nodes.push(newNode(opType, inputs, [output], attributes, domain));
    return output;
  }

  integers(values: readonly number[]): string {
    return this.#graph.constant(`${this.#label}.integers`, TYPE.int64, values);
  }

  cast(name: string, from: number, to: number, output?: string): string {
    if (from === to && output === undefined) return name;
    return this.add('Cast', [name], { to }, '', output);
  }

  /** Columns [start, end) of [1, T, width]. */
  columns(name: string, start: number, end: number): string {
    return this.add('Slice', [name, this.integers([start]), this.integers([end]), this.integers([2])]);
  }

  /** Any layout as float32 [1, T, width]. `tokens` = T of the sample that the dims are of. */
  rows(value: Laid, tokens: number): string {
    let name = this.cast(value.name, value.dataType, TYPE.float);
    const width = sizeOf(value.dims) / tokens;
    const { dims } = value;
    const isHeadsFirst = dims.length >= 3 && dims.at(-2) === tokens && !(dims.length === 3 && dims[0] === 1);
    if (isHeadsFirst) {
      // [.., heads, T, headDim]
      const perm = dims.length === 4 ? [0, 2, 1, 3] : [1, 0, 2];
      name = this.add('Transpose', [name], { perm: { ints: perm } });
    }
    if (dims.length === 3 && !isHeadsFirst) return name;
    return this.add('Reshape', [name, this.integers([1, -1, width])]);
  }

  /** The site itself; returns its output [1, T, width]. */
  site(query: string, key: string, value: string): GraphNode {
    const output = this.#graph.fresh(`${this.#label}.site`);
    const node = newNode('Attention', [query, key, value], [output], {}, SITE_DOMAIN);
    this.nodes.push(node);
    return node;
  }

  /** Brings the site's output into the form that the graph's `target` has. */
  deliver(site: GraphNode, target: Laid, tokens: number, facts: SiteFacts): void {
    const [from = ''] = site.outputs;
    const { dims } = target;
    const { numHeads, headDim } = facts;
    if (dims.length === 3 && dims[1] === tokens && dims[0] === 1) {
      this.cast(from, TYPE.float, target.dataType, target.name);
      return;
    }
    const split = this.add('Reshape', [from, this.integers([1, -1, numHeads, headDim])]);
    const turned = this.add('Transpose', [split], { perm: { ints: [0, 2, 1, 3] } });
    const shaped = dims.length === 4 ? turned : this.add('Reshape', [turned, this.integers([numHeads, -1, headDim])]);
    this.cast(shaped, TYPE.float, target.dataType, target.name);
  }
}
