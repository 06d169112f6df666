/**
 * Owns an ordinary HTTP client of the gateway under test.
 */
import { expect } from 'vitest';
import { type ServerEvent, serverEvents } from '../server-events.ts';
import { gateway } from './running-gateway.ts';

export const url = (): string => `http://127.0.0.1:${Object(gateway.running.stats?.()).httpPort}`;

/** Posts JSON; a string is sent as it is. */
export function post(path: string, body: unknown, init: RequestInit = {}): Promise<Response> {
  return fetch(`${url()}${path}`, {
    method: 'POST',
    ...init,
    headers: { 'content-type': 'application/json', ...init.headers },
    body: typeof body === 'string' ? body : JSON.stringify(body),
  });
}

export async function allEvents(response: Response): Promise<ServerEvent[]> {
  expect(response.headers.get('content-type')).toContain('text/event-stream');
  const events: ServerEvent[] = [];
  for await (const event of serverEvents(response)) events.push(event);
  return events;
}
