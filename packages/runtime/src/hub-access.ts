/**
 * Owns the two variables of the hub, which carry the names that every Hugging Face tool gives them.
 *
 * Invariants
 * 1. The token is taken from the environment only: a flag would be seen by every user of the machine.
 */

export const HUB_VARIABLES = {
  HF_ENDPOINT: 'The hub, or a mirror of it. Default: `https://huggingface.co`.',
  HF_TOKEN: 'Token for private and gated repositories; sent to the hub only.',
} as const;

const DEFAULT_ENDPOINT = 'https://huggingface.co';

export interface HubVariables {
  readonly endpoint: string;
  readonly token: string | undefined;
}

export function hubVariables(environment: Readonly<Record<string, string | undefined>>): HubVariables {
  const { HF_ENDPOINT, HF_TOKEN } = environment;
  return { endpoint: HF_ENDPOINT || DEFAULT_ENDPOINT, token: HF_TOKEN || undefined };
}
