// The keyframe rules in tests/keyframe_cases.json, through the action on the test page. Here the
// cases give the function's answers: no function is asked.

import assert from 'node:assert/strict';
import { readFile } from 'node:fs/promises';
import { after, before, test } from 'node:test';
import { JOB } from './collections.js';
import { NAME, start } from './harness.js';

const path = new URL('../../tests/keyframe_cases.json', import.meta.url);
const { mutable_attributes: mutableIds, defaults, cases } = JSON.parse(await readFile(path));
const labels = [{
    id: 4,
    attributes: [{ id: 21, mutable: false }, ...mutableIds.map((id) => ({ id, mutable: true }))],
}];

let site;
let page;

before(async () => {
    site = await start();
    page = await site.open();
    await page.waitForFunction((name) => globalThis.testPage.find(name), NAME);
});
after(() => site.close());

const completeKeyframe = (keyframe) => ({ ...defaults.keyframe, ...keyframe });

function completeTrack(fields, keyframes) {
    const shapes = keyframes.map(completeKeyframe);
    const frame = Math.min(...shapes.map((keyframe) => keyframe.frame));
    return { ...defaults.object, frame, ...fields, shapes };
}

/** The collection that CVAT has before the run. */
function createCollection({ shape, track }) {
    if (shape) {
        return { shapes: [{ ...defaults.object, ...completeKeyframe(shape), clientID: 9, id: 1 }] };
    }
    const keyframes = track.map((keyframe) => ({ ...keyframe, id: 100 + keyframe.frame }));
    return { tracks: [completeTrack({ clientID: 13, id: 2 }, keyframes)] };
}

/** A job in which `next_frame` follows the tracked frames; the frames between them are deleted. */
function createJob({ frame, tracked, next_frame: next, original }) {
    const used = [frame, ...tracked.map(([number]) => number), ...(next === null ? [] : [next])];
    const [first, last] = [Math.min(...used), Math.max(...used)];
    const keyframes = (original.track ?? []).map((keyframe) => keyframe.frame);
    const stopFrame = next === null ? last : Math.max(last, ...keyframes);
    const deletedFrames = Array.from({ length: last - first }, (_, i) => first + i)
        .filter((number) => !used.includes(number));
    return { ...JOB, labels, stopFrame, deletedFrames };
}

for (const { name, original, frame, interval, tracked, prompt, expected, ...rest } of cases) {
    test(name, async () => {
        const { type } = completeKeyframe(original.shape ?? original.track[0]);
        const points = new Map(tracked);
        let initialPoints;
        site.cvat.interpose = (request) => {
            initialPoints ??= request.shapes[0].points;
            const found = points.get(request.frame);
            const shapes = [found ? { type, points: found } : null];
            return { status: 200, body: { shapes, states: ['a state'] } };
        };
        await page.evaluate(
            ([job, collection]) => globalThis.testPage.openJob(job, collection),
            [createJob({ frame, tracked, original, ...rest }), createCollection(original)],
        );

        const message = await page.evaluate((options) => globalThis.testPage.run(options), {
            name: NAME,
            frame,
            parameters: {
                'Target frame': tracked.at(-1)[0],
                'Convert polygon shapes to tracks': 'true',
                'Keyframe every N frames': interval,
            },
        });

        assert.equal(message, null);
        const content = await page.evaluate(() => globalThis.testPage.content());
        const { shapes, ...fields } = expected;
        const track = completeTrack({ ...defaults.expected, ...fields }, shapes);
        assert.deepEqual(content, { shapes: [], tracks: [track] });
        (prompt ?? []).forEach((value, i) => {
            assert.ok(Math.abs(initialPoints[i] - value) < 1e-5, `prompt: ${initialPoints}`);
        });
    });
}
