/**
 * Owns what a rule of the evaluation sees of a node.
 */
import {
  floatAttribute,
  type GraphNode,
  integerAttribute,
  integersAttribute,
  stringAttribute,
} from './decoder-graph.ts';
import type { Value } from './values.ts';

/** Values of the outputs, in their order. Throws an error that says why, if they cannot be known. */
export type Rule = (operands: Operands) => Value[];

export class Operands {
  readonly node: GraphNode;
  readonly opset: number;
  readonly #inputs: readonly (Value | undefined)[];

  constructor(node: GraphNode, inputs: readonly (Value | undefined)[], opset: number) {
    this.node = node;
    this.#inputs = inputs;
    this.opset = opset;
  }

  get count(): number {
    return this.#inputs.length;
  }

  in(i: number): Value {
    const value = this.#inputs[i];
    if (value === undefined) throw new TypeError(`input ${i} is missing`);
    return value;
  }

  optional(i: number): Value | undefined {
    return this.#inputs[i];
  }

  /** Numbers of an input that decides a shape. */
  numbers(i: number): number[] {
    const numbers = this.in(i).numbers();
    if (numbers === null) throw new TypeError(`its shape depends on values ('${this.node.inputs[i]}')`);
    return Array.from(numbers);
  }

  /** Like numbers, from the attribute of older opsets if there is one, else the input; undefined if neither is there. */
  numbersOf(attribute: string, i: number): number[] | undefined {
    return this.ints(attribute) ?? (this.#inputs[i] === undefined ? undefined : this.numbers(i));
  }

  int(name: string, otherwise: number): number {
    return integerAttribute(this.node, name, otherwise);
  }

  float(name: string, otherwise: number): number {
    return floatAttribute(this.node, name, otherwise);
  }

  ints(name: string): number[] | undefined {
    return integersAttribute(this.node, name);
  }

  string(name: string): string {
    return stringAttribute(this.node, name);
  }
}
