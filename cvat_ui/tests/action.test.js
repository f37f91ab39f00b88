// The action on the test page, with the real function behind `lambda.call`. The harness records the
// function's answers; the annotations must hold exactly these.

import assert from 'node:assert/strict';
import { readFile } from 'node:fs/promises';
import { after, before, beforeEach, describe, test } from 'node:test';
import {
    BLOCK, boxMask, CHANGING, DISC, FIXED, keyframe, moved, shape, track,
} from './collections.js';
import * as harness from './harness.js';

const { NAME, start } = harness;

let site;
let page;
let cvat;

before(async () => {
    site = await start();
    cvat = site.cvat;
    page = await site.open();
    await page.waitForFunction((name) => globalThis.testPage.find(name), NAME);
});
after(() => site.close());
beforeEach(() => cvat.reset());

const openJob = (...rest) => harness.openJob(page, ...rest);
const run = (...rest) => harness.run(page, ...rest);
const noticeText = () => harness.noticeText(page);
const read = () => page.evaluate(() => globalThis.testPage.read());
const content = () => page.evaluate(() => globalThis.testPage.content());
const undo = () => page.evaluate(() => globalThis.testPage.job.undo());
const undoSteps = () => page.evaluate(() => globalThis.testPage.job.undoSteps.length);
const progress = () => page.evaluate(
    () => globalThis.testPage.events.filter(({ text }) => text).map(({ text }) => text),
);

/** Change the answer for one object on some frames: random weights seldom lose an object. */
function answerOn(frames, change, index = 0) {
    cvat.interpose = async (request, forward) => {
        const answer = await forward();
        if (request.type === 'track' && frames.includes(request.frame)) {
            answer.body.shapes[index] = change(answer.body.shapes[index]);
            cvat.answered.at(-1).answer.shapes[index] = answer.body.shapes[index];
        }
        return answer;
    };
}

const frameOf = ({ frame }) => frame;
const visibleFrames = ({ shapes }) => shapes.filter(({ outside }) => !outside).map(frameOf);

/** Check that keyframes or shapes hold the function's answers for an object on some frames. */
function assertHoldsAnswers(shapes, index, frames) {
    const answers = cvat.answers(index);
    for (const frame of frames) {
        const found = shapes.find((candidate) => candidate.frame === frame);
        const answer = answers.get(frame);
        assert.equal(Boolean(found && !found.outside), Boolean(answer), `frame ${frame}`);
        if (answer) {
            assert.deepEqual(found.points, answer.points, `frame ${frame}`);
            assert.equal(found.type, answer.type);
        }
    }
}

describe('shapes', () => {
    test('a mask becomes one mask per frame, all in one group', async () => {
        const other = shape(9, 'polygon', BLOCK.polygon, { group: 6, frame: 8 });
        const mask = shape(8, 'mask', DISC.mask, {
            attributes: [FIXED, CHANGING], occluded: true, z_order: 3,
        });
        await openJob({ shapes: [mask, other] });
        const before_ = await content();

        assert.equal(await run(0, 4), null);

        const after_ = await content();
        const made = after_.shapes.filter(({ group }) => group === 7);
        assert.equal(after_.tracks.length, 0);
        assert.deepEqual(cvat.received.map(({ type, frame }) => [type, frame]), [
            ['init_tracking', 0], ['track', 1], ['track', 2], ['track', 3], ['track', 4],
        ]);
        assertHoldsAnswers(made, 0, [1, 2, 3, 4]);
        const { id, ...drawn } = before_.shapes[0];
        assert.equal(id, 1);
        assert.deepEqual(made[0], { ...drawn, group: 7 });
        for (const tracked of made.slice(1)) {
            assert.deepEqual(
                { ...tracked, points: 0, frame: 0, source: 'manual' }, { ...made[0], points: 0 },
            );
            assert.equal(tracked.source, 'semi-auto');
        }
        assert.ok(made.length > 1, 'the random weights lost the object on every frame');
        assert.equal(after_.shapes.length, made.length + 1); // with the polygon
        assert.match(await noticeText(), /Done: 1 object on 4 frames \(1 to 4\) in \d+ s\./);

        assert.equal(await undoSteps(), 1);
        await undo();
        assert.deepEqual(await content(), before_);
    });

    test('a polygon becomes a track that ends with the target frame', async () => {
        const polygon = shape(9, 'polygon', DISC.polygon, {
            attributes: [FIXED, CHANGING], occluded: true, z_order: 2, group: 5,
        });
        await openJob({ shapes: [polygon] });

        assert.equal(await run(0, 3), null);

        const { shapes, tracks: [made, ...more] } = await content();
        assert.deepEqual([shapes, more], [[], []]);
        assert.deepEqual(made.shapes.map(frameOf), [0, 1, 2, 3, 4]);
        assert.deepEqual(made.shapes[0].points, DISC.polygon);
        assertHoldsAnswers(made.shapes, 0, [1, 2, 3]);
        assert.equal(made.shapes[4].outside, true);
        assert.deepEqual(
            made.shapes.map((key) => [key.occluded, key.z_order]), Array(5).fill([true, 2]),
        );
        assert.deepEqual(made.shapes.map(({ attributes }) => attributes), [[CHANGING], [], [], [], []]);
        assert.deepEqual(
            [made.frame, made.label_id, made.group, made.source, made.attributes],
            [0, 4, 5, 'semi-auto', [FIXED]],
        );
    });

    test('a polygon that is not converted becomes grouped shapes', async () => {
        await openJob({ shapes: [shape(9, 'polygon', DISC.polygon)] });

        assert.equal(await run(0, 3, { convert: false }), null);

        const { shapes, tracks } = await content();
        assert.deepEqual(tracks, []);
        assert.deepEqual([...new Set(shapes.map(({ group }) => group))], [1]);
        assert.deepEqual(shapes[0].points, DISC.polygon);
        assertHoldsAnswers(shapes, 0, [1, 2, 3]);
    });

    for (const type of ['rectangle', 'ellipse']) {
        test(`an upright and a rotated ${type} become tracks`, async () => {
            await openJob({
                shapes: [
                    shape(9, type, DISC[type]),
                    shape(10, type, DISC[type], { rotation: 90 }),
                ],
            });

            assert.equal(await run(0, 2), null);

            const { tracks } = await content();
            assertHoldsAnswers(tracks[0].shapes, 0, [1, 2]);
            assertHoldsAnswers(tracks[1].shapes, 1, [1, 2]);
            assert.deepEqual(tracks.map(({ shapes }) => shapes.map(({ rotation }) => rotation)), [
                [0, 0, 0, 0], [90, 0, 0, 0],
            ]);
            const [upright, rotated] = cvat.received[0].shapes;
            rotated.points.forEach((value, i) => { // both are as wide as they are high
                assert.ok(Math.abs(value - upright.points[i]) < 1e-6);
            });
        });
    }

    test('an oblique rectangle starts from its upright extent', async () => {
        await openJob({ shapes: [shape(9, 'rectangle', [100, 80, 140, 100], { rotation: 30 })] });

        assert.equal(await run(0, 1), null);

        const [cos, sin] = [Math.cos(Math.PI / 6), Math.sin(Math.PI / 6)];
        const [x, y] = [20 * cos + 10 * sin, 20 * sin + 10 * cos];
        cvat.received[0].shapes[0].points.forEach((value, i) => {
            assert.ok(Math.abs(value - [120 - x, 90 - y, 120 + x, 90 + y][i]) < 1e-9);
        });
    });

    test('three objects share one request per frame and keep their order', async () => {
        await openJob({
            shapes: [
                shape(8, 'mask', DISC.mask),
                shape(9, 'polygon', BLOCK.polygon),
                shape(10, 'rectangle', BLOCK.rectangle),
            ],
        });

        assert.equal(await run(0, 3), null);

        assert.deepEqual(
            cvat.received.map(({ type, shapes, states }) => [type, (shapes ?? states).length]),
            [['init_tracking', 3], ['track', 3], ['track', 3], ['track', 3]],
        );
        assert.ok(cvat.received.every(({ job, task }) => job === 4 && task === 4));
        const { shapes, tracks } = await content();
        assertHoldsAnswers(shapes, 0, [1, 2, 3]);
        assert.deepEqual(
            tracks.map(({ shapes: [first] }) => first.type), ['polygon', 'rectangle'],
        );
        assertHoldsAnswers(tracks[0].shapes, 1, [1, 2, 3]);
        assertHoldsAnswers(tracks[1].shapes, 2, [1, 2, 3]);
        assert.match((await progress()).at(-1),
            /^Frame 3 \(3 of 3\) · 3 objects · \d+\.\d s\/frame · 0 s left$/);
    });

    test('a keyframe every third frame, at the end, and around a loss', async () => {
        const allFrames = Array.from({ length: 10 }, (_, i) => i + 1);
        answerOn(allFrames, () => {
            const { frame } = cvat.answered.at(-1);
            return frame === 6 ? null : { type: 'polygon', points: moved(DISC.polygon, 5 * frame) };
        });
        await openJob({ shapes: [shape(9, 'polygon', DISC.polygon)] });

        assert.equal(await run(0, 10, { every: 3 }), null);

        const [made] = (await content()).tracks;
        assert.deepEqual(made.shapes.map(frameOf), [0, 3, 5, 6, 7, 9, 10, 11]);
        assertHoldsAnswers(made.shapes, 0, [3, 5, 6, 7, 9, 10]);
    });
});

describe('tracks', () => {
    const polygonAt = (frame) => moved(DISC.polygon, 5 * frame);

    test('between keyframes, tracking starts from the interpolated position', async () => {
        await openJob({
            tracks: [track(13, [
                keyframe('polygon', 0, polygonAt(0), { attributes: [CHANGING] }),
                keyframe('polygon', 8, polygonAt(8)),
            ], { attributes: [FIXED], group: 3 })],
        });
        const before_ = await content();

        assert.equal(await run(4, 6), null);

        assert.deepEqual(cvat.received[0].shapes, [{ type: 'polygon', points: polygonAt(4) }]);
        const { tracks: [made, ...more] } = await content();
        assert.deepEqual(more, []);
        assert.deepEqual(made.shapes.map(frameOf), [0, 4, 5, 6, 8]);
        assert.deepEqual(made.shapes[1].points, polygonAt(4));
        assertHoldsAnswers(made.shapes, 0, [5, 6]);
        const [{ id, ...first }, { id: other, ...last }] = before_.tracks[0].shapes;
        assert.deepEqual([made.shapes[0], made.shapes[4]], [first, last]);
        assert.ok(id && other);
        assert.deepEqual([made.attributes, made.group, made.source], [[FIXED], 3, 'semi-auto']);

        await undo();
        assert.deepEqual(await content(), before_);
    });

    test('attributes, occluded and order on replaced keyframes are kept', async () => {
        const sitting = { ...CHANGING, value: 'sitting' };
        await openJob({
            tracks: [track(13, [
                keyframe('polygon', 0, polygonAt(0), { attributes: [CHANGING] }),
                keyframe('polygon', 2, polygonAt(2), { attributes: [sitting], occluded: true }),
                keyframe('polygon', 7, polygonAt(7), { z_order: 4 }),
            ])],
        });

        assert.equal(await run(0, 9, { every: 4 }), null);

        const [made] = (await content()).tracks;
        const at = (frame) => made.shapes.find((key) => key.frame === frame);
        assert.deepEqual(at(0).attributes, [CHANGING]);
        assert.deepEqual([at(2).attributes, at(2).occluded, at(2).z_order], [[sitting], true, 0]);
        assert.deepEqual([at(4).attributes, at(4).occluded, at(4).z_order], [[], true, 0]);
        assert.deepEqual([at(7).occluded, at(7).z_order], [false, 4]);
        assert.equal(made.shapes.some(({ frame }) => frame > 9), false); // as before, it does not end
    });

    test('backwards, a track begins earlier and is unchanged after the current frame', async () => {
        await openJob({
            tracks: [track(13, [keyframe('polygon', 5, polygonAt(5), { attributes: [CHANGING] })])],
            shapes: [shape(9, 'polygon', polygonAt(5), { frame: 5, attributes: [CHANGING] })],
        });

        assert.equal(await run(5, 2), null);

        assert.deepEqual(cvat.received.map(frameOf), [5, 4, 3, 2]);
        const { shapes, tracks } = await content();
        assert.deepEqual(shapes, []);
        for (const [i, made] of tracks.entries()) {
            assertHoldsAnswers(made.shapes, i, [4, 3, 2]);
            assert.equal(made.frame, 2);
            assert.deepEqual(made.shapes[0].attributes, [CHANGING]);
        }
        const frames = tracks.map((made) => made.shapes.map(frameOf));
        assert.deepEqual(frames.toSorted((a, b) => a.length - b.length), [
            [2, 3, 4, 5], [2, 3, 4, 5, 6], // the shape was on frame 5 alone
        ]);
    });

    test('a lost track is outside until it is found again; a lost mask has no shape', async () => {
        cvat.interpose = async (request, forward) => {
            const answer = await forward();
            if ([2, 3].includes(request.frame)) { // for a rectangle the function answers `outside`
                answer.body.shapes = [
                    null, { ...answer.body.shapes[1], outside: true }, null,
                ];
                cvat.answered.at(-1).answer.shapes = [null, null, null];
            }
            return answer;
        };
        await openJob({
            shapes: [shape(8, 'mask', DISC.mask)],
            tracks: [
                track(14, [keyframe('rectangle', 0, BLOCK.rectangle)]),
                track(13, [keyframe('polygon', 0, polygonAt(0))]),
            ],
        });

        assert.equal(await run(0, 5), null);

        const { shapes, tracks } = await content();
        assertHoldsAnswers(shapes, 0, [1, 2, 3, 4, 5]);
        assert.deepEqual(shapes.filter(({ frame }) => frame === 2 || frame === 3), []);
        for (const [i, made] of tracks.entries()) {
            assertHoldsAnswers(made.shapes, i + 1, [1, 2, 3, 4, 5]);
            const lost = made.shapes.filter(({ frame }) => frame === 2 || frame === 3);
            const [before_] = made.shapes.filter(({ frame }) => frame === 1);
            assert.deepEqual(lost.map(({ outside }) => outside), [true, true]);
            assert.deepEqual(lost.map(({ points }) => points), [before_.points, before_.points]);
        }
    });

    test('hidden, locked and outside objects are left alone', async () => {
        const outside = keyframe('polygon', 0, polygonAt(0), { outside: true });
        const later = keyframe('polygon', 3, polygonAt(3));
        await openJob({
            shapes: [
                shape(8, 'mask', DISC.mask, { hidden: true }),
                shape(9, 'polygon', DISC.polygon, { lock: true }),
                shape(10, 'rectangle', BLOCK.rectangle),
                shape(11, 'points', DISC.polygon),
            ],
            tracks: [track(13, [outside]), track(14, [later])],
        });
        const before_ = await content();

        assert.equal(await run(0, 1), null);

        assert.equal(cvat.received[0].shapes.length, 1);
        const after_ = await content();
        assert.deepEqual(after_.shapes, before_.shapes.filter(({ type }) => type !== 'rectangle'));
        assert.deepEqual(after_.tracks.slice(0, 2), before_.tracks);
        assert.deepEqual(
            await page.evaluate((name) => globalThis.testPage.isApplicable(name, 0), NAME),
            { 8: false, 9: false, 11: false, 13: false, 1001: true },
        );
    });

    test('one object alone, from its menu', async () => {
        await openJob({
            shapes: [shape(8, 'mask', DISC.mask), shape(9, 'mask', BLOCK.mask, { group: 4 })],
        });

        assert.equal(await run(0, 2, { clientID: 8 }), null);

        assert.ok(cvat.received.every(({ shapes, states }) => (shapes ?? states).length === 1));
        const { shapes } = await content();
        assert.deepEqual(shapes.filter(({ group }) => group === 4).map(frameOf), [0]);
        assertHoldsAnswers(shapes.filter(({ group }) => group === 5), 0, [1, 2]);
    });

    test('a recorded input of CVAT is tracked', async () => {
        const path = new URL('./recorded_input.json', import.meta.url);
        const recorded = JSON.parse(await readFile(path));
        const scale = (points) => points.map((value) => value / 4); // it was 1280 x 720
        const { shapes, tracks } = recorded.input.collection;
        const small = (big) => (big.type === 'mask' ? big : { ...big, points: scale(big.points) });
        await openJob({
            shapes: shapes.map(small),
            tracks: tracks.map((big) => ({ ...big, shapes: big.shapes.map(small) })),
        });

        assert.equal(await run(recorded.input.frameData.number, 9), null);

        assert.deepEqual(
            cvat.received[0].shapes.map(({ points }) => points),
            recorded.states_at_7.map(({ points }) => scale(points)),
        );
        const after_ = await content();
        assert.deepEqual(after_.shapes, shapes.map(small).map(({ clientID, ...rest }) => rest));
        assert.deepEqual(after_.tracks.map((made) => made.shapes.map(frameOf)), [
            [0, 7, 8, 9, 10, 20], [0, 7, 8, 9],
        ]);
    });
});

describe('running again from a corrected frame', () => {
    test('a track: only the keyframes up to the target are replaced', async () => {
        await openJob({ shapes: [shape(9, 'polygon', DISC.polygon)] });
        assert.equal(await run(0, 8), null);
        const [first] = (await read()).tracks;
        const corrected = moved(DISC.polygon, 15);
        await page.evaluate(
            ([id, points]) => globalThis.testPage.job.correct(id, 3, points),
            [first.clientID, corrected],
        );
        cvat.reset();

        assert.equal(await run(3, 6), null);

        const [again, ...more] = (await content()).tracks;
        assert.deepEqual(more, []);
        const at = ({ shapes }, frames) => shapes.filter(({ frame }) => frames.includes(frame));
        assert.deepEqual(at(again, [0, 1, 2, 7, 8, 9]), at(first, [0, 1, 2, 7, 8, 9]));
        assert.deepEqual(at(again, [3])[0].points, corrected);
        assertHoldsAnswers(again.shapes, 0, [4, 5, 6]);
        assert.notDeepEqual(at(again, [4, 5, 6]), at(first, [4, 5, 6]));
    });

    test('masks: the same, but a shape that a person drew or locked stays', async () => {
        const earlier = (clientID, frame, changes = {}) => shape(clientID, 'mask', DISC.mask, {
            frame, group: 2, source: 'semi-auto', ...changes,
        });
        const staying = [
            earlier(20, 1), earlier(23, 7), // outside the range
            earlier(24, 5, { source: 'manual' }), earlier(25, 6, { lock: true }),
            earlier(26, 4, { group: 3 }), earlier(27, 4, { label_id: 5 }),
            shape(28, 'polygon', DISC.polygon, { frame: 4, group: 2, source: 'semi-auto' }),
        ];
        const replaced = [earlier(30, 4), earlier(31, 3)];
        const mask = shape(8, 'mask', boxMask(50, 70, 90, 110), { frame: 2, group: 2 });
        await openJob({ shapes: [mask, ...staying, ...replaced] });
        const ids = (list) => list.map(({ clientID }) => clientID);

        assert.equal(await run(2, 6), null);

        const { shapes } = await read();
        assert.deepEqual(
            ids(shapes).filter((id) => id < 1000).sort(), [8, ...ids(staying)].sort(),
        );
        const made = shapes.filter(({ clientID }) => clientID > 1000);
        assert.ok(made.every(({ group, source }) => group === 2 && source === 'semi-auto'));
        assert.ok(made.every(({ frame }) => frame === 3 || frame === 4));
        assertHoldsAnswers(made, 0, [3, 4]);
    });

    test('one of two alike objects in a group: the other object keeps its shapes', async () => {
        const series = (firstID, points) => [0, 1, 2].map((frame) => shape(
            firstID + frame, 'mask', points, { frame, group: 2, source: 'semi-auto' },
        ));
        // On frame 2 only the other object has a shape, far from the new one.
        const before_ = [...series(10, DISC.mask).slice(0, 2), ...series(20, BLOCK.mask)];
        await openJob({ shapes: before_ });
        answerOn([1, 2], () => ({ type: 'mask', points: DISC.mask }));

        assert.equal(await run(0, 2, { clientID: 10 }), null);

        const { shapes } = await read();
        assert.deepEqual(
            shapes.map(({ clientID }) => clientID).sort((a, b) => a - b),
            [10, 20, 21, 22, 1001, 1002],
        );

        const stray = shape(30, 'mask', boxMask(10, 150, 20, 160), {
            frame: 2, group: 2, source: 'semi-auto', // overlaps neither
        });
        await openJob({ shapes: [...series(10, DISC.mask), ...series(20, BLOCK.mask), stray] });
        cvat.reset();

        assert.equal(await run(0, 2), null); // both: of three shapes one cannot be theirs

        const both = (await read()).shapes.map(({ clientID }) => clientID);
        assert.deepEqual(both.filter((id) => id < 1000), [10, 20, 30]);

        await openJob({ shapes: [
            ...series(10, DISC.mask).slice(0, 1), ...series(20, BLOCK.mask), stray,
        ] });
        cvat.reset();

        assert.equal(await run(0, 2), null); // two shapes are theirs, even one without overlap

        const left = (await read()).shapes.map(({ clientID }) => clientID);
        assert.deepEqual(left.filter((id) => id < 1000), [10, 20]);
    });

    test('a locked shape of another object does not keep the frame from being tracked', async () => {
        const mask = (clientID, frame, points, changes = {}) => shape(clientID, 'mask', points, {
            frame, group: 2, source: 'semi-auto', ...changes,
        });
        await openJob({ shapes: [
            mask(10, 0, DISC.mask), mask(11, 1, DISC.mask),
            mask(20, 1, boxMask(10, 150, 20, 160), { lock: true }),
        ] });
        answerOn([1], () => ({ type: 'mask', points: DISC.mask }));

        assert.equal(await run(0, 1), null);

        const { shapes } = await read();
        assert.deepEqual(
            shapes.map(({ clientID }) => clientID).sort((a, b) => a - b), [10, 20, 1001],
        );
    });
});

describe('long runs', () => {
    const polygon = () => ({ shapes: [shape(9, 'polygon', DISC.polygon)] });
    const lastFrame = async () => (await content()).tracks[0].shapes.filter(
        ({ outside }) => !outside,
    ).at(-1).frame;

    test('Cancel stops after the frame in flight and keeps the tracked frames', async () => {
        answerOn([1, 2, 3], () => ({ type: 'polygon', points: DISC.polygon }));
        await openJob(polygon());

        assert.equal(await run(0, 11, { cancelAfter: 'Frame 3 (' }), null);

        assert.deepEqual(cvat.received.map(frameOf), [0, 1, 2, 3]);
        assert.equal(await lastFrame(), 3);
        assert.match(await noticeText(),
            /Cancelled before frame 4\. Kept: frames 0 to 3\. One undo takes it back/);
    });

    test('Cancel before the first tracked frame changes nothing', async () => {
        await openJob(polygon());
        const before_ = await content();

        assert.equal(await run(0, 11, { cancelAfter: 'Frame 0' }), null);

        assert.deepEqual(await content(), before_);
        assert.equal(await undoSteps(), 0);
        assert.match(await noticeText(), /Cancelled before frame 1\. Nothing was changed/);
    });

    test('503 twice, then success: the request is repeated with growing pauses', async () => {
        let failures = 0;
        cvat.interpose = (request, forward) => {
            if (request.frame === 2 && failures < 2) {
                failures += 1;
                return { status: 503, body: '503 Server Error' };
            }
            return forward();
        };
        await openJob(polygon());

        assert.equal(await run(0, 3), null);

        assert.deepEqual(cvat.received.map(frameOf), [0, 1, 2, 2, 2, 3]);
        assertHoldsAnswers((await content()).tracks[0].shapes, 0, [1, 2, 3]);
        assert.match(await noticeText(), /Done: 1 object on 3 frames/);
        const retries = (await progress()).filter((text) => text.includes('trying again'));
        assert.deepEqual(retries, [
            'Frame 2: the function does not answer (503) · trying again in 1 s (1 of 3)',
            'Frame 2: the function does not answer (503) · trying again in 3 s (2 of 3)',
        ]);
        const percents = await page.evaluate(() => globalThis.testPage.events
            .map(({ percent }) => percent).filter((percent) => percent !== undefined));
        assert.deepEqual(percents, percents.toSorted((a, b) => a - b));
        const paused = await page.evaluate(() => globalThis.testPage.events
            .filter(({ pause }) => pause === 250).length);
        assert.equal(paused * 250, 4000);
    });

    test('no network: three repetitions, then the tracked frames are kept', async () => {
        cvat.interpose = (request, forward) => (request.frame === 2 ? null : forward());
        await openJob(polygon());

        assert.equal(await run(0, 3), null);

        assert.deepEqual(cvat.received.map(frameOf), [0, 1, 2, 2, 2, 2]);
        assert.deepEqual((await content()).tracks[0].shapes.map(frameOf).slice(0, 2), [0, 1]);
        assert.match(await noticeText(), /Frame 2 failed: the server does not answer\. Kept: frames 0 to 1/);
    });

    test('Cancel during a pause stops the run', async () => {
        cvat.interpose = (request, forward) => (
            request.frame === 2 ? { status: 503, body: 'busy' } : forward()
        );
        await openJob(polygon());

        assert.equal(await run(0, 3, { cancelAfter: 'Frame 2: the function does not answer' }), null);

        assert.deepEqual(cvat.received.map(frameOf), [0, 1, 2]);
        assert.match(await noticeText(), /Cancelled before frame 2\. Kept: frames 0 to 1/);
    });

    test('500 on frame 5: the tracked frames are kept, the notice names frame and reason', async () => {
        cvat.interpose = (request, forward) => (
            request.frame === 5 ? { status: 500, body: 'Internal Server Error' } : forward()
        );
        await openJob({ shapes: [...polygon().shapes, shape(8, 'mask', DISC.mask)] });

        assert.equal(await run(0, 8), null);

        const { shapes, tracks } = await content();
        assertHoldsAnswers(tracks[0].shapes, 0, [1, 2, 3, 4]);
        assertHoldsAnswers(shapes, 1, [1, 2, 3, 4]);
        assert.ok([...shapes, ...tracks[0].shapes].every(({ frame }) => frame <= 5));
        assert.equal(visibleFrames(tracks[0]).includes(5), false);
        assert.match(await noticeText(),
            /Frame 5 failed: the function failed \(500\)\. Kept: frames 0 to 4\./);
    });

    test('a failure before the first frame is an error and changes nothing', async () => {
        cvat.interpose = () => ({ status: 500, body: 'Internal Server Error' });
        await openJob(polygon());
        const before_ = await content();

        assert.equal(
            await run(0, 8),
            'Frame 0 failed: the function failed (500). Nothing was changed.',
        );
        assert.deepEqual(await content(), before_);
        assert.equal(await undoSteps(), 0);
    });

    for (const [who, expire] of [
        ['CVAT (400)', () => cvat.expireStates()],
        ['the function (410)', () => {
            let refused = false;
            const { interpose } = cvat;
            cvat.interpose = (request, forward) => {
                if (request.type === 'track' && request.frame === 3 && !refused) {
                    refused = true;
                    return { status: 410, body: '410 Gone' };
                }
                return interpose(request, forward);
            };
        }],
    ]) {
        test(`a state refused by ${who} starts again from the last tracked shape`, async () => {
            let expired = false;
            cvat.interpose = async (request, forward) => {
                if (request.frame === 3 && !expired) {
                    expired = true;
                    expire();
                    return cvat.interpose(request, forward);
                }
                const answer = await forward();
                if (request.type === 'track' && request.frame === 2) { // the second object is lost
                    answer.body.shapes[1] = null;
                    cvat.answered.at(-1).answer.shapes[1] = null;
                }
                return answer;
            };
            await openJob({
                shapes: [shape(9, 'rectangle', DISC.rectangle), shape(8, 'rectangle', BLOCK.rectangle)],
            });

            assert.equal(await run(0, 4), null);

            assert.deepEqual(
                cvat.received.map(({ type, frame }) => `${type} ${frame}`),
                ['init_tracking 0', 'track 1', 'track 2', 'track 3', 'init_tracking 2',
                    'init_tracking 1', 'track 3', 'track 4'],
            );
            const [first, second] = cvat.received.filter(({ type }) => type === 'init_tracking').slice(1);
            const [onFrame1, onFrame2] = [1, 2].map((frame) => cvat.answered.find(
                (request) => request.type === 'track' && request.frame === frame,
            ).answer.shapes);
            assert.deepEqual(first.shapes, [onFrame2[0]]);
            assert.deepEqual(second.shapes, [onFrame1[1]]);
            const { tracks } = await content();
            assertHoldsAnswers(tracks[0].shapes, 0, [1, 2, 3, 4]);
            assertHoldsAnswers(tracks[1].shapes, 1, [1, 2, 3, 4]);
            assert.match(await noticeText(), /Done: 2 objects on 4 frames/);
        });
    }

    test('a state that is refused again and again is a failure', async () => {
        cvat.interpose = (request, forward) => (request.type === 'track' && request.frame === 2
            ? { status: 400, body: 'Invalid or expired tracker state' } : forward());
        await openJob(polygon());

        assert.equal(await run(0, 4), null);

        assert.equal(cvat.received.length, 5);
        assert.match(await noticeText(), /Frame 2 failed: the tracking state has expired \(400\)/);
    });

    test('a malformed shape is left out, and the notice says so', async () => {
        const malformed = [
            { type: 'polygon', points: [1, 2, 3, 4] },
            { type: 'polygon', points: [1, 2, 3, 4, 5, 'x'] },
            { type: 'rectangle', points: [1, 2, 3, 4] },
            { type: 'polygon' },
            'polygon',
        ];
        answerOn([1, 2, 3, 4, 5], () => malformed[cvat.answered.at(-1).frame - 1]);
        await openJob(polygon());

        assert.equal(await run(0, 5), null);

        assert.deepEqual(visibleFrames((await content()).tracks[0]), [0]);
        assert.match(await noticeText(), /Frame 1: the function's polygon was malformed/);
    });

    test('malformed masks, rectangles and ellipses are left out too', async () => {
        const malformed = [
            [{ type: 'mask', points: [0, 5, 1, 1, 2, 2] }, { type: 'rectangle', points: [5, 5, 5, 9] },
                { type: 'ellipse', points: [5, 5, 5, 4] }],
            [{ type: 'mask', points: [0.5, 3.5, 1, 1, 2, 2] }, { type: 'rectangle', points: [5, 5, 9] },
                { type: 'ellipse', points: [5, 5, 6, 6] }],
        ];
        cvat.interpose = async (request, forward) => {
            const answer = await forward();
            answer.body.shapes = malformed[request.frame - 1] ?? answer.body.shapes;
            return answer;
        };
        await openJob({
            shapes: [
                shape(8, 'mask', DISC.mask),
                shape(9, 'rectangle', BLOCK.rectangle),
                shape(10, 'ellipse', DISC.ellipse),
            ],
        });

        assert.equal(await run(0, 2), null);

        const { shapes, tracks } = await content();
        assert.deepEqual(shapes.map(frameOf), [0]);
        assert.deepEqual(tracks.map(visibleFrames), [[0], [0]]);
    });

    test('too few answers are a failure', async () => {
        cvat.interpose = async (request, forward) => {
            const answer = await forward();
            if (request.frame === 2) {
                answer.body.states = [];
            }
            return answer;
        };
        await openJob(polygon());

        assert.equal(await run(0, 3), null);

        assert.match(await noticeText(),
            /Frame 2 failed: the function answered 0 states for 1 object\. Kept: frames 0 to 1/);
    });

    test('deleted frames are skipped', async () => {
        await openJob(polygon(), { deletedFrames: [2, 3, 5] });

        assert.equal(await run(0, 4), null);

        assert.deepEqual(cvat.received.map(frameOf), [0, 1, 4]);
        const [made] = (await content()).tracks;
        assert.deepEqual(made.shapes.map(frameOf).slice(0, 3), [0, 1, 4]);
        assert.ok(made.shapes.slice(3).every(({ frame, outside }) => frame === 6 && outside));
    });
});

describe('parameters', () => {
    test('the target is the last frame of the job unless set', async () => {
        await openJob({ shapes: [shape(9, 'polygon', DISC.polygon)] }, { startFrame: 1, stopFrame: 9 });

        const [type, values, value] = await page.evaluate((name) => {
            const target = globalThis.testPage.find(name).parameters['Target frame'];
            const context = { instance: globalThis.testPage.job };
            return [target.type, target.values(context), target.defaultValue(context)];
        }, NAME);

        assert.deepEqual([type, values, value], ['number', ['1', '9', '1'], '9']);
    });

    test('impossible requests get a clear message, and the function is not called', async () => {
        await openJob({ shapes: [shape(9, 'polygon', DISC.polygon)] }, { deletedFrames: [1] });

        assert.match(await run(3, 3), /^Target frame is the current frame, 3: nothing to do\./);
        assert.equal(
            await run(3, 12), 'Target frame 12 is not in this job: choose one from 0 to 11.',
        );
        assert.equal(await run(0, 1), 'Every frame between 0 and 1 is deleted.');
        assert.equal(
            await run(3, 5), 'No object to track on frame 3: draw one, or show and unlock it.',
        );
        assert.deepEqual(cvat.received, []);
    });

    test('for a task that is open outside a job, requests have no job', async () => {
        await openJob(
            { shapes: [shape(9, 'polygon', DISC.polygon)] },
            { taskId: undefined, size: 3, startFrame: 50, stopFrame: 52 }, // of the video file
        );

        assert.equal(
            await run(0, 3), 'Target frame 3 is not in this job: choose one from 0 to 2.',
        );
        assert.equal(await run(0, 2), null);
        assert.deepEqual(cvat.received.map(frameOf), [0, 1, 2]);
        assert.ok(cvat.received.every(({ task, job }) => task === 4 && job === undefined));
    });

    test('the action runs from a window: choose, run, done', async () => {
        await openJob({ shapes: [shape(9, 'polygon', DISC.polygon)] }, { stopFrame: 2 });
        await page.evaluate(() => globalThis.testPage.openWindow(0));
        await page.getByRole('button', { name: 'Run' }).click();
        await page.waitForSelector('dialog[data-done]');

        assert.deepEqual(cvat.received.map(frameOf), [0, 1, 2]);
        assert.equal((await content()).tracks.length, 1);
        await page.evaluate(() => document.querySelector('dialog').remove());
    });
});
