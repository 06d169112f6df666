/** Owns what the clients of a chaos run ask: prompts, lengths and sampling, from the seed. */
import type { Random } from './random.ts';

export interface ChaosRequest {
  readonly prompt: string;
  readonly maxTokens: number;
  readonly temperature: number;
  readonly seed: number;
}

const OPENINGS = ['Once upon a time', 'Tom and Sam', 'The little goat', 'One day a bird', 'Lily had a red ball'];
const MIDDLES = [' went to the park', ' saw a big dog', ' was very sad', ' wanted to fly', ' found a box'];

/** Half of the requests greedy, half seeded; prompts of some 5 to 120 tokens. */
export function makeRequests(count: number, random: Random): ChaosRequest[] {
  return Array.from({ length: count }, (_, index) => ({
    prompt: `${random.pick(OPENINGS)}${random.pick(MIDDLES).repeat(random.between(1, 12))}, number ${index}.`,
    maxTokens: random.between(60, 140),
    temperature: index % 2 === 0 ? 0 : 0.8,
    seed: random.between(1, 1_000_000),
  }));
}

/** What is sent, over NATS and over HTTP. */
export function bodyOf({ prompt, maxTokens, temperature, seed }: ChaosRequest): Readonly<Record<string, unknown>> {
  return { prompt, max_tokens: maxTokens, temperature, seed, ignore_eos: true };
}

export const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));
