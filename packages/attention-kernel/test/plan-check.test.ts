/** Owns the proof that no plan can make a kernel touch memory that it should not. */
import { LaminaError, type StepPlan } from '@lamina/tensor';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { checkPlan } from '../src/plan-check.ts';
import { emptyPlan, makeLayout } from './support.ts';

const layout = makeLayout({ blockSizeTokens: 16 });
const NUM_BLOCKS = 4;

const good: StepPlan = {
  numQueryRows: 3,
  numKvRows: 2,
  segments: Int32Array.from([0, 2, 15, 0, 2, 2, 1, 40, 2, 1]),
  blocks: Int32Array.from([3, 0, 16, 0, 16, 1, 1, 32, 9]),
  kvSlots: Int32Array.from([63, 0]),
};

/** `good` with one number of one array replaced. */
function change(name: 'segments' | 'blocks' | 'kvSlots', index: number, value: number): StepPlan {
  const array = good[name].slice();
  array[index] = value;
  return { ...good, [name]: array };
}

describe('checkPlan', () => {
  test('accepts a good plan and an empty one', () => {
    expect(checkPlan(good, layout, NUM_BLOCKS).segments).toEqual(good.segments);
    expect(checkPlan(emptyPlan(), layout, NUM_BLOCKS).segments).toHaveLength(0);
  });

  test('copies the arrays, so that a later change by the caller has no effect', () => {
    const plan = { ...good, blocks: good.blocks.slice() };
    const checked = checkPlan(plan, layout, NUM_BLOCKS);
    plan.blocks[0] = 1_000_000;
    expect(checked.blocks[0]).toBe(3);
  });

  test('gives rows of no segment a segment without blocks', () => {
    const plan = emptyPlan({ numQueryRows: 5, segments: Int32Array.from([1, 2, 7, 0, 0]) });
    expect([...checkPlan(plan, layout, NUM_BLOCKS).segments]).toEqual([1, 2, 7, 0, 0, 0, 1, 0, 0, 0, 3, 2, 0, 0, 0]);
  });

  test.each<[string, StepPlan, RegExp]>([
    ['a block above the slab', change('blocks', 3, NUM_BLOCKS), /blocks\[1\] has physicalBlock 4/],
    ['a negative block', change('blocks', 0, -1), /blocks\[0\] has physicalBlock -1/],
    ['a position inside a block', change('blocks', 4, 17), /blocks\[1\] has firstPosition 17/],
    ['a negative position', change('blocks', 1, -16), /blocks\[0\] has firstPosition -16/],
    ['too many tokens', change('blocks', 8, 17), /blocks\[2\] has numTokens 17/],
    ['negative tokens', change('blocks', 2, -1), /blocks\[0\] has numTokens -1/],
    ['blocks out of order', change('blocks', 1, 32), /blocks\[1\] has firstPosition 16, not above 32/],
    ['the same position twice', change('blocks', 4, 0), /blocks\[1\] has firstPosition 0, not above 0/],
    ['a row past the end', change('segments', 6, 2), /segments\[1\] covers rows 2 \+ 2 of 3/],
    ['a negative row', change('segments', 0, -1), /segments\[0\] covers rows -1/],
    ['two segments on one row', change('segments', 5, 1), /segments\[1\] covers query row 1/],
    ['a block range past the end', change('segments', 9, 2), /segments\[1\] uses blocks 2 \+ 2 of 3/],
    ['a negative block range', change('segments', 4, -1), /segments\[0\] uses blocks/],
    ['a negative query position', change('segments', 2, -1), /segments\[0\] has firstPosition -1/],
    ['a position that overflows', change('segments', 2, 2 ** 31 - 1), /segments\[0\] has firstPosition/],
    ['a slot above the slab', change('kvSlots', 0, 64), /kvSlots\[0\] is 64; this shard has 64 slots/],
    ['a negative slot', change('kvSlots', 1, -1), /kvSlots\[1\] is -1/],
    ['a slot twice', change('kvSlots', 1, 63), /kvSlots\[1\] is 63, which an earlier row has/],
    ['a ragged segment list', { ...good, segments: good.segments.slice(0, 9) }, /not a multiple of 5/],
    ['a ragged block list', { ...good, blocks: good.blocks.slice(0, 8) }, /not a multiple of 3/],
    ['too few slots', { ...good, numKvRows: 3 }, /kvSlots has 2 numbers for 3 kv rows/],
    ['a fractional count', { ...good, numQueryRows: 2.5 }, /numQueryRows is 2.5/],
    ['a negative count', { ...good, numKvRows: -1 }, /numKvRows is -1/],
  ])('refuses %s', (_, plan, message) => {
    expect(() => checkPlan(plan, layout, NUM_BLOCKS)).toThrow(message);
    expect(() => checkPlan(plan, layout, NUM_BLOCKS)).toThrow(LaminaError);
  });

  test('whatever the numbers, a checked plan has no index out of range', () => {
    const int = fc.oneof(fc.integer({ min: -2, max: 70 }), fc.integer());
    const array = (fields: number) =>
      fc
        .array(fc.array(int, { minLength: fields, maxLength: fields }), { maxLength: 4 })
        .map((rows) => Int32Array.from(rows.flat()));
    fc.assert(
      fc.property(fc.nat(6), array(5), array(3), array(1), (numQueryRows, segments, blocks, kvSlots) => {
        let checked: StepPlan;
        try {
          checked = checkPlan(
            { numQueryRows, numKvRows: kvSlots.length, segments, blocks, kvSlots },
            layout,
            NUM_BLOCKS,
          );
        } catch (error) {
          expect(error).toBeInstanceOf(LaminaError);
          return;
        }
        const rows = new Set<number>();
        for (let i = 0; i < checked.segments.length; i += 5) {
          const [start, count, , first, numBlocks] = checked.segments.subarray(i, i + 5);
          for (let row = start!; row < start! + count!; row++) rows.add(row);
          expect(first! >= 0 && first! + numBlocks! <= checked.blocks.length / 3).toBe(true);
        }
        expect([...rows].sort()).toEqual(Array.from({ length: numQueryRows }, (_, i) => i));
        for (const slot of checked.kvSlots) expect(slot >= 0 && slot < NUM_BLOCKS * 16).toBe(true);
      }),
      { numRuns: 2000, seed: 1 },
    );
  });
});
