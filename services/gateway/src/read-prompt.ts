/**
 * Owns what a durable prompt asks for, and under which id and encoding it is answered, even if its body is bad.
 *
 * Invariants
 * 1. Reading never throws: what is wrong is the answer to the prompt.
 */
import type { DurablePrompt } from '@lamina/bus';
import {
  encodingOf,
  type GenerateRequest,
  idSchema,
  type ParsedGenerateBody,
  parseGenerateBody,
  requestIdOf,
  type WireEncoding,
} from '@lamina/protocol';
import { asLaminaError, LaminaError } from '@lamina/tensor';
import { CLIENT_HEADER, clientIdOf } from './client-id.ts';

const MESSAGE_ID_HEADER = 'Nats-Msg-Id';

/** When a prompt is to end although nobody can answer it. */
export interface PromptTerms {
  readonly id: string;
  /** Unix time in ms; Infinity for none. */
  readonly deadlineAtMs: number;
}

export interface ReadPrompt extends PromptTerms {
  readonly isIdGenerated: boolean;
  readonly encoding: WireEncoding;
  /** Or why it is refused. */
  readonly asked: { readonly request: GenerateRequest; readonly client: string } | LaminaError;
}

type Stored = Pick<DurablePrompt, 'sequence' | 'storedAtMs' | 'data' | 'header'>;

export function readPrompt(prompt: Stored): ReadPrompt {
  const generatedId = `p${prompt.sequence}`;
  try {
    const parsed = parseGenerateBody(prompt.data);
    const { request, encoding } = parsed;
    const id = givenId(parsed, prompt) ?? generatedId;
    const client = clientIdOf(prompt.header(CLIENT_HEADER));
    const deadlineAtMs = request.deadline_ms === undefined ? Infinity : prompt.storedAtMs + request.deadline_ms;
    return { id, isIdGenerated: id === generatedId, encoding, deadlineAtMs, asked: { request, client } };
  } catch (cause) {
    const headerId = idSchema.safeParse(prompt.header(MESSAGE_ID_HEADER)).data;
    const id = requestIdOf(prompt.data) ?? headerId ?? generatedId;
    const encoding = encodingOf(prompt.data);
    return { id, isIdGenerated: id === generatedId, encoding, deadlineAtMs: Infinity, asked: asLaminaError(cause) };
  }
}

/** @throws LaminaError `invalid_request` */
function givenId({ request }: ParsedGenerateBody, prompt: Stored): string | undefined {
  const given = request.id ?? prompt.header(MESSAGE_ID_HEADER);
  if (given === undefined) return undefined;
  const checked = idSchema.safeParse(given);
  if (checked.success) return checked.data;
  const problem = checked.error.issues[0]?.message ?? 'is no id';
  throw new LaminaError('invalid_request', `the header ${MESSAGE_ID_HEADER}, which is the id here, ${problem}`);
}
