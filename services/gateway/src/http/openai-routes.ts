/**
 * Owns OpenAI's endpoints: /v1/completions, /v1/chat/completions, /v1/models.
 *
 * Invariants
 * 1. A client that hangs up cancels its request, unless it named it: then it may come back for it, to any gateway.
 * 2. Event ids of a stream are token indices: the same body with the same Idempotency-Key and a Last-Event-ID resumes it.
 */
import { LIMITS } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify';
import { createId, type Gateway } from '../gateway.ts';
import type { Access } from './access.ts';
import { collectAnswer, onGone, streamAnswer } from './answers.ts';
import { CHAT, COMPLETION, type OpenAiFormat, type ReplyFacts } from './openai-reply.ts';
import { type OpenAiRequest, readChatCompletion, readCompletion } from './openai-request.ts';

export interface ApiParts {
  readonly modelId: string;
  readonly gateway: Pick<Gateway, 'open' | 'follow' | 'unfollow' | 'hangUp' | 'stateOf' | 'requestCancel'>;
  readonly access: Access;
}

const ID_HEADER = 'idempotency-key';
export const REQUEST_ID_HEADER = 'Lamina-Request-Id';

/** @throws LaminaError `invalid_request` */
export function lastEventIndex(request: FastifyRequest): number {
  const given = request.headers['last-event-id']?.toString();
  if (given === undefined || given === '') return -1;
  const index = Number(given);
  if (Number.isSafeInteger(index) && index >= 0 && index <= LIMITS.maxTokens) return index;
  throw new LaminaError('invalid_request', 'the header Last-Event-ID must be the index of a token');
}

export function registerOpenAi(server: FastifyInstance, { modelId, gateway, access }: ApiParts): void {
  const startedAt = Math.floor(Date.now() / 1000);

  const complete = async (
    request: FastifyRequest,
    reply: FastifyReply,
    format: OpenAiFormat,
    read: (body: unknown, id: string | undefined) => OpenAiRequest,
  ): Promise<unknown> => {
    const client = access.clientOf(request);
    const { generate, isStream, includeUsage } = read(request.body, request.headers[ID_HEADER]?.toString());
    const afterIndex = lastEventIndex(request);
    // What the client calls it; its messages have the id that the cluster knows.
    const id = generate.id ?? createId();
    const facts: ReplyFacts = {
      id,
      model: modelId,
      created: Math.floor(Date.now() / 1000),
      hasLogprobs: generate.logprobs !== undefined,
    };
    const open = (sink: Parameters<Gateway['open']>[1]): void => {
      const parsed = { request: generate, encoding: 'json' as const };
      const relay = gateway.open(parsed, sink, client, access.requestIdOf(client, id));
      reply.header(REQUEST_ID_HEADER, id);
      onGone(reply, () => gateway.hangUp(relay));
    };
    if (!isStream) {
      const { sink, messages } = collectAnswer(reply);
      open(sink);
      const collected = await messages;
      return collected === undefined ? reply.hijack() : format.whole(facts, collected);
    }
    const { sink, done } = streamAnswer(reply, {
      afterIndex,
      event: (message) => format.chunk(facts, message),
      ending: ({ usage }) => [...(includeUsage ? [format.usageChunk(facts, usage)] : []), '[DONE]'],
    });
    open(sink);
    await done;
    return reply;
  };

  const admitting = access.admitting('requests');
  server.post('/v1/completions', admitting, (request, reply) => complete(request, reply, COMPLETION, readCompletion));
  server.post('/v1/chat/completions', admitting, (request, reply) =>
    complete(request, reply, CHAT, readChatCompletion),
  );

  const model = { id: modelId, object: 'model', created: startedAt, owned_by: 'lamina' };
  server.get('/v1/models', access.identifying, async () => ({ object: 'list', data: [model] }));
  server.get<{ Params: { '*': string } }>('/v1/models/*', access.identifying, async ({ params }) => {
    if (params['*'] === modelId) return model;
    throw new LaminaError('unknown_model', `the model "${params['*']}" is not served here; "${modelId}" is`);
  });
}
