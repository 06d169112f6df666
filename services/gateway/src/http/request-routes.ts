/**
 * Owns /v1/requests: the state of a request, its tokens from any index on, and its cancellation, at any gateway.
 *
 * Invariants
 * 1. All of it is counted, and beyond the rate answered with the time after which to try again. Such a cancel was not done.
 */
import { idSchema } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import type { FastifyInstance } from 'fastify';
import { streamAnswer } from './answers.ts';
import { type ApiParts, lastEventIndex } from './openai-routes.ts';

function checkedId(id: string): string {
  const checked = idSchema.safeParse(id);
  if (checked.success) return checked.data;
  throw new LaminaError('invalid_request', `the id ${checked.error.issues[0]?.message ?? 'is none'}`);
}

function unknown(id: string): LaminaError {
  return new LaminaError('unknown_request', `nothing is known of a request "${id}"`);
}

export function registerRequests(server: FastifyInstance, { gateway, access }: ApiParts): void {
  interface WithId {
    Params: { id: string };
  }

  const admitting = access.admitting('followUps');
  server.get<WithId>('/v1/requests/:id', admitting, async (request) => {
    const client = access.clientOf(request);
    const id = checkedId(request.params.id);
    const state = await gateway.stateOf(access.requestIdOf(client, id));
    if (state === 'unknown') throw unknown(id);
    return { id, state };
  });

  server.get<WithId>('/v1/requests/:id/events', admitting, async (request, reply) => {
    const client = access.clientOf(request);
    const id = checkedId(request.params.id);
    const afterIndex = lastEventIndex(request);
    const requestId = access.requestIdOf(client, id);
    const state = await gateway.stateOf(requestId);
    if (state === 'unknown') throw unknown(id);
    if (state === 'cut')
      throw new LaminaError('unavailable', `nobody works on the rest of "${id}"; send the request again`);
    const { sink, done } = streamAnswer(reply, {
      afterIndex,
      event: (message) => ({ ...message, id }),
      ending: () => ['[DONE]'],
    });
    const relay = gateway.follow(requestId, sink, client);
    try {
      await done;
    } finally {
      gateway.unfollow(relay);
    }
    return reply;
  });

  server.delete<WithId>('/v1/requests/:id', admitting, async (request, reply) => {
    const client = access.clientOf(request);
    const id = checkedId(request.params.id);
    const requestId = access.requestIdOf(client, id);
    // Also where nothing is known: a durable prompt may still be in its stream.
    gateway.requestCancel(requestId);
    const state = await gateway.stateOf(requestId);
    if (state === 'unknown') throw unknown(id);
    return reply.code(state === 'ended' ? 200 : 202).send({ id, state: state === 'ended' ? state : 'cancelling' });
  });
}
